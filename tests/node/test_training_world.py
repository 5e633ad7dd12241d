"""Real nodes in a simulated world: two who train and one who generates, while hops die."""

import pytest
import torch
import trio

from petalnode.models.checkpoint import open_checkpoint
from petalnode.session.session import GenerateOptions
from petalnode.simnet.world import open_world

from .test_chain import prompt, reference_tokens
from .training_swarm import HIDDEN, at_once, error_of, numbers, tuning

LENGTHS = [40, 128, 7, 90, 128, 61]
TOKENS = sum(LENGTHS)
NEW = 12
SERVING = {"a": (0, 2), "a2": (0, 2), "b": (2, 4), "b2": (2, 4)}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


def weights(node):
    """Every tensor that the blocks of a node reach, by its way there."""
    found, seen = {}, set()

    def look(thing, way):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[way] = thing.clone()
        elif isinstance(thing, dict):
            for name, value in thing.items():
                look(value, f"{way}.{name}")
        elif isinstance(thing, list | tuple):
            for number, value in enumerate(thing):
                look(value, f"{way}.{number}")
        elif getattr(thing, "__closure__", None):
            for number, cell in enumerate(thing.__closure__):
                look(cell.cell_contents, f"{way}.{number}")
        elif type(thing).__module__.startswith("petalnode") and hasattr(thing, "__dict__"):
            look(vars(thing), way)

    look(node.service.span, "span")
    assert len(found) >= 2 * 6  # two blocks: four matrices and two norms
    return found


async def train(node, batch, added, got, name, steps=2):
    """Forward and backward, a few times; the last results."""
    async with node.open_training() as training:
        for _ in range(steps):
            output, record = await training.forward(batch[0], LENGTHS, added)
            got[name] = output, *await training.backward(record, batch[1])


async def generate(node, got):
    async with node.open_session() as session:
        options = GenerateOptions(NEW)
        got["text"] = [token.id async for token in session.generate(prompt(20), options)]


def in_midst_of(kind, node, act):
    """Do something when that node is in the midst of its first such pass."""
    engine, acts = node.service.engine, [act]
    turn = engine._training_turn

    def watched():
        steps = engine._jobs[0].steps
        if acts and steps is not None and steps.job.kind == kind:
            acts.pop()()
        return turn()

    engine._training_turn = watched


def assert_alike(got, expected):
    assert error_of(got[0], expected[0]) < 1e-5
    assert error_of(got[1], expected[1]) < 1e-4
    assert got[2].keys() == expected[2].keys()
    for name, value in got[2].items():
        assert error_of(value, expected[2][name]) < 1e-4, name


async def test_two_train_and_one_generates_while_hops_die(checkpoint, autojump_clock):
    batch = numbers(TOKENS, HIDDEN), numbers(TOKENS, HIDDEN, seed=2)
    mine, others = tuning(), tuning(seed=7)
    got = {}
    async with open_world(3, open_checkpoint(str(checkpoint)), latency_s=0.01) as world:
        nodes = {name: await world.start(name, blocks=span) for name, span in SERVING.items()}
        clients = [await world.start(f"client{number}") for number in range(3)]
        await trio.sleep(3)
        before = {name: weights(node) for name, node in nodes.items()}
        in_midst_of("forward", nodes["a"], lambda: world.kill("a"))
        in_midst_of("backward", nodes["b"], lambda: world.kill("b"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(train, clients[0], batch, mine, got, "mine")
            nursery.start_soon(train, clients[1], batch, others, got, "others")
            nursery.start_soon(generate, clients[2], got)
        for name in ("a2", "b2"):
            after = weights(nodes[name])
            assert after.keys() == before[name].keys()
            assert all(torch.equal(after[way], before[name][way]) for way in after)
            with trio.fail_after(1):
                await nodes[name].service.wait_idle()
            assert nodes[name].service.training._tunings.used == 0
        with trio.fail_after(1):
            for name in ("a", "b"):
                await world._members[name].ended.wait()
    assert got["text"] == reference_tokens(checkpoint, prompt(20), NEW)
    for name, added in (("mine", mine), ("others", others)):
        assert_alike(got[name], at_once(checkpoint, batch[0], LENGTHS, batch[1], added))


async def test_a_node_trains_through_its_own_blocks(checkpoint, autojump_clock):
    batch = numbers(TOKENS, HIDDEN), numbers(TOKENS, HIDDEN, seed=2)
    got = {}
    async with open_world(4, open_checkpoint(str(checkpoint))) as world:
        node = await world.start("a", blocks=(0, 4))
        await train(node, batch, tuning(), got, "own", steps=1)
        assert node.service.engine.training_steps
    assert_alike(got["own"], at_once(checkpoint, batch[0], LENGTHS, batch[1], tuning()))


async def test_a_node_that_leaves_loses_no_work(checkpoint, autojump_clock):
    batch = numbers(TOKENS, HIDDEN), numbers(TOKENS, HIDDEN, seed=2)
    got = {}
    async with open_world(5, open_checkpoint(str(checkpoint)), latency_s=0.01) as world:
        first = await world.start("a", blocks=(0, 4))
        client = await world.start("client")
        await trio.sleep(2)
        began = trio.Event()
        in_midst_of("forward", first, began.set)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(train, client, batch, tuning(), got, "left", 1)
            await began.wait()
            await world.start("b", blocks=(0, 4))
            started = trio.current_time()
            await first.drain()
            assert trio.current_time() - started < 20
            assert first.service.sessions == 0
        banned = client.swarm.health.banned(trio.current_time())
        assert not banned
    assert_alike(got["left"], at_once(checkpoint, batch[0], LENGTHS, batch[1], tuning()))


async def test_who_is_slower_than_it_says_gets_less(checkpoint, autojump_clock):
    lengths, hidden = [64] * 64, numbers(64 * 64, HIDDEN)
    async with open_world(6, open_checkpoint(str(checkpoint))) as world:
        fast = await world.start("fast", blocks=(0, 4))
        slow = await world.start("slow", blocks=(0, 4), slowness=4.0, boast=4.0)
        client = await world.start("client")
        for node in (fast, slow):
            node.service.training._kept.ahead_size = 0  # all steps are counted then
        await trio.sleep(3)
        async with client.open_training() as training:
            _, record = await training.forward(hidden, lengths)
            before = fast.service.engine.training_steps, slow.service.engine.training_steps
            await training.forward(hidden, lengths)
            await training.backward(record, hidden)
        steps = [
            node.service.engine.training_steps - already
            for node, already in zip((fast, slow), before, strict=True)
        ]
    assert sum(steps) == 16 * 4 * (1 + 2)
    assert steps[0] > 2.5 * steps[1] > 0
