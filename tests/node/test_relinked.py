"""Links that change while a chain serves: relays that are needed no more, feeds that come late."""

import random

import pytest
import trio

from petalnode.session.recovery import DIRECT_S
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .misfortune import VirtualCompute
from .test_chain import prompt, reference_tokens
from .test_recovery import SPANS, SPARES, Finder

LIMIT_S = 600.0
NEW = 60
PAUSE_S = 2.0


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


class Relayed:
    """A session with a token every ``PAUSE_S``, whose hops b and c part after the fifth."""

    def __init__(self):
        self.relayed_at, self.slowest_s = [], 0.0

    async def run(self, checkpoint, disturb, spans=SPANS):
        with trio.fail_after(LIMIT_S):
            async with open_memory_swarm(checkpoint) as self.swarm:
                for span in spans:
                    server = self.swarm.add(*span)
                    server.engine._compute = VirtualCompute(random.Random(0))
                self.swarm.compute = VirtualCompute(random.Random(0))
                self.finder = Finder(self.swarm)
                async with self.swarm.session(*SPANS, replacements=self.finder) as session:
                    session.tokenizer.eos_ids = frozenset()
                    tokens = await self._generate(session, disturb)
        assert tokens == reference_tokens(checkpoint, prompt(20), NEW)
        assert [error for error in self.finder.blamed if error.peer_id not in "c"] == []

    async def _generate(self, session, disturb):
        tokens = []
        async for token in session.generate(prompt(20), GenerateOptions(NEW)):
            tokens.append(token.id)
            if len(tokens) == 5:
                self.swarm.part("b", "c")
            disturb(self.swarm, len(tokens))
            if any(line.through for line in session.chain.lines):
                self.relayed_at.append(len(tokens))
            await trio.sleep(PAUSE_S)
            self.slowest_s = max(self.slowest_s, token.ms / 1000 - PAUSE_S)
        return tokens


async def test_a_relay_ends_when_the_hops_reach_each_other(checkpoint, autojump_clock):
    def heal(swarm, count):
        if count == 30:
            swarm.cut.clear()

    session = Relayed()
    await session.run(checkpoint, heal)
    assert session.relayed_at[0] == 6
    assert 30 <= session.relayed_at[-1] <= 30 + DIRECT_S / PAUSE_S + 1
    assert session.slowest_s < 1.0


async def test_a_relay_stays_while_they_do_not(checkpoint, autojump_clock):
    session = Relayed()
    await session.run(checkpoint, lambda swarm, count: None)
    assert session.relayed_at == list(range(6, NEW + 1))
    assert session.slowest_s < 1.0
    assert len(session.finder.events) == 1  # trying disturbs nothing


async def test_one_that_reaches_it_only_to_try(checkpoint, autojump_clock):
    """The link breaks right when it is used: the client relays again."""
    feeds = []

    def heal(swarm, count):
        if count == 10:
            swarm.cut.clear()
        for a, b, _ in swarm._open:
            if count > 10 and (a, b) == ("b", "c") and not feeds:
                feeds.append(count)
                swarm.part("b", "c")

    session = Relayed()
    await session.run(checkpoint, heal)
    assert feeds
    assert session.relayed_at[-1] == NEW


async def test_a_step_that_came_out_still_goes_where_it_is_lacking(checkpoint):
    """The first hop dies with a chunk on its way through the others, which comes out just before
    the replacement is sent it."""
    release, lacking = trio.Event(), []
    async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
        run, opened = swarm.servers["d"].engine.run, swarm.open_stream
        async with swarm.session(*SPANS, replacements=Finder(swarm)) as session:
            session.tokenizer.eos_ids = frozenset()
            chain, streams = session.chain, []

            async def hold_the_second_chunk(start, end, rows, hidden):
                if rows[0].position == 256 and not release.is_set():
                    swarm.kill("a")
                    await release.wait()
                return await run(start, end, rows, hidden)

            async def come_out_before_the_feed(peer, protocol):
                streams.append(peer)
                if streams == ["a2", "a2"]:  # control, feed
                    release.set()
                    while chain.committed[0] < 512:
                        await chain.news()
                return await opened(peer, protocol)

            swarm.servers["d"].engine.run = hold_the_second_chunk
            swarm.open_stream = come_out_before_the_feed
            chain._mender.lacks = lambda line, why: lacking.append(why)
            with trio.fail_after(60):
                generation = session.generate(prompt(900), GenerateOptions(3))
                tokens = [token.id async for token in generation]
    assert streams == ["a2", "a2"]
    assert tokens == reference_tokens(checkpoint, prompt(900), 3)
    assert lacking == []
