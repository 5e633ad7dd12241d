"""A chain of four hops in memory, what is done to it in mid-text, and who replaces what is lost."""

from collections.abc import Callable

import pytest
import trio

from petalnode.errors import NoRoute
from petalnode.routing.chain import Hop
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .test_chain import prompt, reference_tokens

SPANS = [("a", 0, 1), ("b", 1, 2), ("c", 2, 3), ("d", 3, 4)]
SPARES = [(f"{peer}2", start, end) for peer, start, end in SPANS]
NEW = 24
LOOK_AGAIN_S = 0.5
LIMIT_S = 60.0


class Finder:
    """Replacements among the servers of a memory swarm, the widest first."""

    def __init__(self, swarm, avoid=()):
        self.swarm, self.never = swarm, set(avoid)
        self.events, self.blamed = [], []
        self.came, self.slow, self.patience_s = trio.Event(), None, 5

    async def find(self, gap, avoid):
        start, end = gap.first, gap.last
        until = trio.current_time() + self.patience_s
        while True:
            hops, block = [], start
            while block < end:
                best = [
                    (min(s.engine.span.end, end), peer)
                    for peer, s in self.swarm.servers.items()
                    if s.engine.span.start <= block < s.engine.span.end
                    and peer not in avoid
                    and peer not in self.never
                ]
                if not best:
                    break
                stop, peer = max(best)
                hops.append(Hop(peer, block, stop))
                block = stop
            else:
                return hops
            left_s = until - trio.current_time()
            if left_s <= 0:
                raise NoRoute("Nobody serves these blocks.", "", tuple(range(start, end)))
            with trio.move_on_after(min(left_s, LOOK_AGAIN_S)):
                await self.came.wait()

    def observe(self, hop, took_s):
        assert 0 < took_s < 60

    def addrs(self, peer_id):
        return ()

    def is_slow(self, hop, took_s):
        return hop.peer_id == self.slow

    def blame(self, error):
        self.blamed.append(error)

    def report(self, event, hops):
        self.events.append((event, [hop.peer_id for hop in hops]))


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


async def generate(checkpoint, spans, hops, disturb: Callable, *, length=20, avoid=()):
    """Tokens of a session over ``hops``; ``disturb(swarm, position)`` is called at each token."""
    with trio.fail_after(LIMIT_S):
        return await disturbed(checkpoint, spans, hops, disturb, length, avoid)


async def disturbed(checkpoint, spans, hops, disturb, length, avoid):
    async with open_memory_swarm(checkpoint, spans) as swarm:
        finder = Finder(swarm, avoid)
        async with swarm.session(*hops, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(length), GenerateOptions(NEW)):
                tokens.append(token.id)
                disturb(swarm, len(tokens), session)
        await trio.testing.wait_all_tasks_blocked()
        for server in swarm.servers.values():
            assert server.budget.tokens_free == 100_000
            assert server.server.sessions == 0
    assert tokens == reference_tokens(checkpoint, prompt(length), NEW)
    return finder


def kill(*peers, at=5):
    def disturb(swarm, count, session):
        if count == at:
            for peer in peers:
                swarm.kill(peer)

    return disturb
