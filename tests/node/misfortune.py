"""Everything that may happen to a session, at random moments of a virtual clock, from a seed.

Real hop servers over memory streams. Computing and sending take random times; hops die before or
after they computed, drain, are slow, lose sight of each other for a while; logs are short; a death
is heard of by some later than by others. The same seed does the same every time.
"""

import random
from collections.abc import Callable

import trio

from petalnode.models.beam_scores import common_prefix
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.memory import MemoryByteStream
from petalnode.serving.budget import KvBudget
from petalnode.session.session import GenerateOptions, Session

from .memory_swarm import MemorySwarm, open_memory_swarm
from .test_chain import prompt
from .test_recovery import SPANS, SPARES, Finder

WIDE = [("x", 0, 2), ("y", 1, 4), ("z", 0, 4), ("w", 2, 4)]
NEW = 16
TURN_S, SEND_S, LATE_S, BETWEEN_S = 0.004, 0.003, 0.02, 0.15
KV_TOKENS = 100_000
LEAST = 4
FREED_WITHIN_S = 5.0
WAIT_S = 40.0
LIMIT_S = 300.0


class VirtualCompute:
    """``Compute`` that takes random times."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._one_at_a_time = trio.Lock()

    async def run(self, function, load=None):
        async with self._one_at_a_time:
            with trio.CancelScope(shield=True):
                await trio.sleep(self._chance.expovariate(1 / TURN_S))
                return function()

    def tell(self, call: Callable[[], None]) -> None:
        call()


def slow_writes(chance: random.Random):
    """A ``write`` for memory streams that sometimes takes a while."""
    write = MemoryByteStream.write

    async def slow(self, *buffers) -> None:
        if chance.random() < 0.5:
            await trio.sleep(chance.expovariate(1 / SEND_S))
        await write(self, *buffers)

    return slow


class Misfortune:
    """One schedule. ``killed``, ``finder.blamed``: who died, and who was held responsible.
    ``gaps``: what hops were not sent that they should have been."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.killed: set[str] = set()
        self.gaps: list[str] = []
        self.short_logs = self.chance.random() < 0.5
        self._rate = self.chance.choice((0.003, 0.01, 0.03))
        self.num_beams = self.chance.choice((1, 1, 2, 4))
        self.prompts = [
            prompt(self.chance.choice((1, 5, 40, 270, 600)))
            for _ in range(self.chance.choice((1, 1, 2, 3)))
        ]
        self.way = self.chance.choice((self._batch, self._one_by_one, self._cut_off))
        if self.way == self._cut_off:
            self.num_beams = 1

    async def run(self, checkpoint) -> list[list[int]]:
        """The tokens of each prompt; what the hops held is given back."""
        with trio.fail_after(LIMIT_S):
            async with open_memory_swarm(checkpoint) as self.swarm, trio.open_nursery() as nursery:
                self._nursery = nursery
                self.swarm.compute = VirtualCompute(self.chance)
                for span in [*SPANS, *SPARES, *WIDE]:
                    self._add(*span)
                self.finder = Finder(self.swarm)
                self.finder.patience_s = WAIT_S
                rows = self.num_beams * len(self.prompts)
                async with self.swarm.session(
                    *SPANS, rows=rows, replacements=self.finder
                ) as session:
                    session.tokenizer.eos_ids = frozenset()
                    self._watch_gaps(session)
                    nursery.start_soon(self._strike, session)
                    tokens = await self.way(session)
                await trio.sleep(FREED_WITHIN_S)
                nursery.cancel_scope.cancel()
        self._check_freed(self.swarm)
        return tokens

    def wrongly_blamed(self) -> list[str]:
        """What was said of peers that neither died nor drained."""
        return [
            str(error)
            for error in self.finder.blamed
            if error.peer_id not in self.killed and "leave" not in str(error)
        ]

    async def _batch(self, session: Session) -> list[list[int]]:
        options = GenerateOptions(NEW, num_beams=self.num_beams)
        batch = session.generate_batch(self.prompts, options)
        async for _ in batch:
            pass
        return [completion.tokens for completion in batch.completions]

    async def _one_by_one(self, session: Session) -> list[list[int]]:
        found = []
        for ids in self.prompts:
            session.rollback(0)
            generation = session.generate(ids, GenerateOptions(NEW, num_beams=self.num_beams))
            found.append([token.id async for token in generation])
        return found

    async def _cut_off(self, session: Session) -> list[list[int]]:
        """Cancelled at any moment, rolled back to what still holds, and tried again."""
        found = []
        for ids in self.prompts:
            tokens: list[int] = []
            while len(tokens) < NEW:
                same = common_prefix([session.ids, ids[:-1]])
                session.rollback(self.chance.choice((0, len(same))))
                with trio.move_on_after(self.chance.expovariate(1 / (2 * BETWEEN_S))):
                    generation = session.generate(ids[len(session.ids) :], GenerateOptions(NEW))
                    tokens = [token.id async for token in generation]
            found.append(tokens)
        return found

    def _add(self, peer: str, start: int, end: int) -> None:
        server = self.swarm.add(peer, start, end, kv_tokens=KV_TOKENS)
        engine = server.engine
        engine._compute = VirtualCompute(self.chance)
        if self.short_logs:
            room = self.chance.choice((0, 0, 70, 200, 1000))
            server.server._log_budget = KvBudget(room, 1)
        run = engine.run

        async def may_die(*work):
            if self.chance.random() < self._rate and self._kill(peer):
                await trio.sleep_forever()
            output = await run(*work)
            if self.chance.random() < self._rate and self._kill(peer):
                await trio.sleep_forever()
            return output

        engine.run = may_die

    async def _strike(self, session: Session) -> None:
        while True:
            await trio.sleep(self.chance.expovariate(1 / BETWEEN_S))
            hops = [hop.peer_id for hop in session.chain.hops]
            victim, kind = self.chance.choice(hops), self.chance.random()
            if kind < 0.3:
                self._kill(victim)
            elif kind < 0.5:
                place = self.chance.randrange(len(hops))
                if victim != hops[place]:
                    self.swarm.part(victim, hops[place])
            elif kind < 0.75 and self._can_spare(victim):
                await self.swarm.servers[victim].server.drain()
            elif kind < 0.85:
                self.finder.slow = victim
                session.chain._mender._look_at = 0
            elif kind < 0.92:
                self.swarm.cut.clear()

    def _can_spare(self, peer: str) -> bool:
        others = [
            server.engine.span
            for other, server in self.swarm.servers.items()
            if other != peer and not server.server.draining
        ]
        held = all(any(s.start <= block < s.end for s in others) for block in range(4))
        return peer in self.swarm.servers and len(self.swarm.servers) > LEAST and held

    def _kill(self, peer: str) -> bool:
        """As ``MemorySwarm.kill``, but some hear of it later than others."""
        if not self._can_spare(peer):
            return False
        self.killed.add(peer)
        del self.swarm.servers[peer]
        for _, _, stream in [entry for entry in self.swarm._open if peer in entry[:2]]:
            after_s = self.chance.choice((0.0, self.chance.expovariate(1 / LATE_S)))
            self._nursery.start_soon(break_later, stream, after_s)
        self.swarm._open = [entry for entry in self.swarm._open if peer not in entry[:2]]
        return True

    def _watch_gaps(self, session: Session) -> None:
        lacks = session.chain._mender.lacks

        def noted(line, why):
            self.gaps.append(f"{line.peer_id}: {why}")
            lacks(line, why)

        session.chain._mender.lacks = noted

    def _check_freed(self, swarm: MemorySwarm) -> None:
        for server in swarm.servers.values():
            assert server.budget.tokens_free == KV_TOKENS
            assert server.server.sessions == 0
            assert server.server.log_tokens == 0


async def break_later(stream: FrameStream, after_s: float) -> None:
    """Reset a stream after a while."""
    await trio.sleep(after_s)
    stream.reset()
