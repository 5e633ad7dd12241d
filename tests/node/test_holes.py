"""A chain with a hole that nobody fills holds no node that drains: that may come to fill it."""

import random

import pytest
import trio

from petalnode.session.recovery import HOLE_S
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .misfortune import VirtualCompute
from .test_chain import prompt, reference_tokens
from .test_recovery import NEW, SPANS, Finder

SOON_S = 1.0
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


def add(swarm, *span):
    server = swarm.add(*span)
    server.engine._compute = VirtualCompute(random.Random(0))


async def move(swarm, peer, start, end):
    """As ``Holding`` does: drain, and serve other blocks when the sessions have gone."""
    server = swarm.servers[peer].server
    await server.drain()
    with trio.fail_after(HOLE_S + SOON_S):
        await server.wait_idle()
    add(swarm, peer, start, end)


async def generated(checkpoint, spans, strike):
    """The finder of a session that ``strike(swarm, nursery)`` hit after five tokens."""
    with trio.fail_after(LIMIT_S):
        async with open_memory_swarm(checkpoint) as swarm, trio.open_nursery() as nursery:
            for span in spans:
                add(swarm, *span)
            finder = Finder(swarm)
            finder.patience_s = 30
            swarm.compute = VirtualCompute(random.Random(0))
            async with swarm.session(*SPANS, replacements=finder) as session:
                session.tokenizer.eos_ids = frozenset()
                tokens = []
                async for token in session.generate(prompt(20), GenerateOptions(NEW)):
                    tokens.append(token.id)
                    if len(tokens) == 5:
                        await strike(swarm, nursery)
    assert tokens == reference_tokens(checkpoint, prompt(20), NEW)
    return finder


@pytest.mark.parametrize("moving", ["a", "c", "d"])
@pytest.mark.parametrize("after_s", [0.0, 5.0])
async def test_a_node_that_moves_into_the_hole(checkpoint, autojump_clock, moving, after_s):
    """It drains while the session waits already, or right when the hole appears."""
    start = "abcd".index(moving)

    async def strike(swarm, nursery):
        swarm.kill("b")

        async def later():
            await trio.sleep(after_s)
            await move(swarm, moving, 1, 2)

        nursery.start_soon(later)

    spare = ("spare", start, start + 1)
    finder = await generated(checkpoint, [*SPANS, spare], strike)
    assert finder.events[-1][1][1] == moving
    assert finder.events[-1][1][start] == "spare"


async def test_a_session_that_is_asked_for_nothing(checkpoint, autojump_clock):
    """Nobody awaits an output, so nobody mends the chain."""

    async def strike(swarm, nursery):
        swarm.kill("b")
        await trio.sleep(10)
        await move(swarm, "c", 1, 2)

    finder = await generated(checkpoint, [*SPANS, ("spare", 2, 3)], strike)
    assert finder.events[-1][1] == ["a", "c", "spare", "d"]


async def test_one_that_drains_first(checkpoint, autojump_clock):
    """Nobody can take over from it, so it still serves when another dies."""

    async def strike(swarm, nursery):
        nursery.start_soon(move, swarm, "c", 1, 3)
        await trio.sleep(HOLE_S / 4)
        swarm.kill("b")

    finder = await generated(checkpoint, SPANS, strike)
    assert finder.events[-1][1] == ["a", "c", "d"]


async def test_one_that_drains_is_kept_where_others_take_over(checkpoint, autojump_clock):
    """There is no hole: it is moved away from, not lost."""

    async def strike(swarm, nursery):
        nursery.start_soon(swarm.servers["c"].server.drain)
        swarm.kill("b")

    spares = [("b2", 1, 2), ("c2", 2, 3)]
    finder = await generated(checkpoint, [*SPANS, *spares], strike)
    assert [event.lost for event, _ in finder.events if event is not None] == [["b"]]
    assert [error.peer_id for error in finder.blamed] == ["b"]
