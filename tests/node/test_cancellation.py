"""Cancelled steps and sessions that end in the middle: exact afterwards, and all is freed."""

import pytest
import torch
import trio

from petalnode.errors import UsageError
from petalnode.protocol import HOP_PROTOCOL, Open, Segment, Step
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .test_chain import ONE, TWO, greedy, prompt, reference_tokens


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


async def open_control(swarm, **options):
    stream = await swarm.open_stream("a", HOP_PROTOCOL)
    opened = Open(bytes(16), swarm.checkpoint.fingerprint, 0, 4, 1, **options)
    await stream.send(opened.to_wire())
    assert (await stream.receive()).header["type"] == "opened"
    return stream


async def open_feed(swarm):
    stream = await swarm.open_stream("a", HOP_PROTOCOL)
    await stream.send({"type": "feed", "session": bytes(16)})
    assert (await stream.receive()).header["type"] == "fed"
    return stream


async def test_a_step_cancelled_while_the_choice_waits_is_repeated_exactly(checkpoint):
    expected = reference_tokens(checkpoint, prompt(9), 20)
    async with open_memory_swarm(checkpoint, TWO) as swarm, swarm.session(*TWO) as session:
        run, scopes, cut = swarm.compute.run, [], []

        async def interrupted(function):
            if len(session.ids) == session.cached == 14 and not cut:
                cut.append(True)
                scopes[-1].cancel()
                await trio.lowlevel.checkpoint()
            return await run(function)

        swarm.compute.run = interrupted
        generation = session.generate(prompt(9), GenerateOptions(max_new_tokens=20))
        while generation.finish_reason is None:
            with trio.CancelScope() as scope:
                scopes.append(scope)
                await anext(generation)
        assert cut
        assert generation.tokens == expected


async def test_rollback_between_two_tokens_of_one_generation(checkpoint):
    async with open_memory_swarm(checkpoint, TWO) as swarm, swarm.session(*TWO) as session:
        generation = session.generate(prompt(9), GenerateOptions(max_new_tokens=8))
        first = [(await anext(generation)).id for _ in range(4)]
        session.rollback(11)
        assert [(await anext(generation)).id for _ in range(2)] == first[2:]
        session.rollback(0)
        with pytest.raises(UsageError, match="rolled back"):
            await anext(generation)


@pytest.mark.parametrize("steps", [1, 3, 10, 40, 150])
async def test_a_prefill_cancelled_midway_leaves_the_session_usable(checkpoint, steps):
    ids = prompt(1900)
    expected = reference_tokens(checkpoint, ids, 3)
    async with open_memory_swarm(checkpoint, TWO) as swarm, swarm.session(*TWO) as session:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greedy, session, ids, 3)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        session.rollback(min(len(session.ids), 1899))
        assert await greedy(session, ids[len(session.ids) :], 3) == expected


async def test_a_client_that_leaves_during_its_step_frees_at_once(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        server = swarm.servers["a"]

        async def never(*work):
            await trio.sleep_forever()

        server.engine.run = never
        stream = await open_control(swarm)
        feed = await open_feed(swarm)
        await feed.send(Step(1, (Segment(0, 0, 9, 0),)).to_wire(), [torch.zeros(9, 64)])
        await trio.testing.wait_all_tasks_blocked()
        assert server.budget.tokens_free < 100_000
        stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert server.server.sessions == 0
        assert server.budget.tokens_free == 100_000


async def test_a_feed_that_waits_when_the_session_ends_takes_nothing(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        server = swarm.servers["a"]
        control = await open_control(swarm, sender="x")
        run, go = server.engine.run, trio.Event()

        async def later(*work):
            await go.wait()
            return await run(*work)

        server.engine.run = later
        for n in (200, 5):
            feed = swarm.dial("x", "a")
            await feed.send({"type": "feed", "session": bytes(16)})
            await feed.receive()
            await feed.send(Step(1, (Segment(0, 0, n, 0),)).to_wire(), [torch.zeros(n, 64)])
            await trio.testing.wait_all_tasks_blocked()
        control.reset()
        await trio.testing.wait_all_tasks_blocked()
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert server.budget.tokens_free == 100_000
        assert server.server.sessions == 0
