"""Training through hops: the same numbers as here, whatever the chain, whatever dies on the way."""

from itertools import pairwise

import pytest
import torch
import trio

from petalnode.errors import NoRoute, UsageError
from petalnode.models.tuning.tuning import NOTHING
from petalnode.training.batches import cut

from .training_swarm import (
    DEADLINE_S,
    FOUR,
    HIDDEN,
    at_once,
    error_of,
    numbers,
    open_training_swarm,
    tuning,
)

LENGTHS = [5, 130, 1, 64, 70, 33]
TOKENS = sum(LENGTHS)
CLOSE = 1e-5
CHAINS = {
    1: [("a", 0, 4)],
    2: [("a", 0, 2), ("b", 2, 4)],
    4: FOUR,
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def batch():
    return numbers(TOKENS, HIDDEN), numbers(TOKENS, HIDDEN, seed=2)


@pytest.fixture(scope="module")
def expected(checkpoint, batch):
    return at_once(checkpoint, batch[0], LENGTHS, batch[1], tuning())


async def both(training, batch, added=None):
    """Forward and backward once."""
    output, record = await training.forward(batch[0], LENGTHS, tuning() if added is None else added)
    return output, *await training.backward(record, batch[1])


def assert_same(got, expected):
    output, grad, grads = got
    assert error_of(output, expected[0]) < CLOSE
    assert error_of(grad, expected[1]) < CLOSE
    assert grads.keys() == expected[2].keys()
    for name, value in grads.items():
        assert value.dtype == torch.float32
        assert error_of(value, expected[2][name]) < 1e-4, name


@pytest.mark.parametrize("hops", CHAINS)
async def test_over_any_chain_the_same_numbers(checkpoint, batch, expected, hops):
    async with open_training_swarm(checkpoint, CHAINS[hops]) as swarm, swarm.training() as training:
        assert_same(await both(training, batch), expected)
        assert not swarm.failures


@pytest.mark.parametrize(
    ("weights", "close"),
    [({"dtype": "bfloat16"}, 0.1), ({"quant": "int8"}, 1e-4), ({"quant": "nf4"}, 1e-4)],
)
async def test_on_weights_of_other_kinds(checkpoint, batch, weights, close):
    async with open_training_swarm(checkpoint) as swarm, swarm.training() as training:
        swarm.add("a", 0, 2, **weights)
        swarm.add("b", 2, 4, **weights)
        output, grad, grads = await both(training, batch)
    parts = [  # which columns int8 leaves alone depends on all tokens that are computed together
        at_once(checkpoint, m.of(batch[0]), m.lengths, m.of(batch[1]), tuning(), **weights)
        for m in cut(LENGTHS)
    ]
    assert output.dtype == grad.dtype == torch.float32
    assert error_of(output, torch.cat([part[0] for part in parts])) < close
    assert error_of(grad, torch.cat([part[1] for part in parts])) < close
    for name in grads:
        assert error_of(grads[name], sum(part[2][name] for part in parts)) < close, name


async def test_leaving_makes_the_hops_forget(checkpoint, batch):
    async with open_training_swarm(checkpoint, CHAINS[2]) as swarm:
        async with swarm.training() as training:
            await both(training, batch)
            servers = [peer.server for peer in swarm.peers.values()]
            assert [server._tunings.used for server in servers] == [
                tuning().within(*span[1:]).nbytes for span in CHAINS[2]
            ]
            assert [server.sessions for server in servers] == [1, 1]
        with trio.fail_after(DEADLINE_S):
            for server in servers:
                await server.wait_idle()
        assert [(server._tunings.used, server._room.used) for server in servers] == [(0, 0)] * 2


async def test_a_tuning_goes_out_when_it_has_changed(checkpoint, batch):
    added = tuning()
    async with open_training_swarm(checkpoint, CHAINS[1]) as swarm, swarm.training() as training:
        await both(training, batch, added)
        (line,) = training.crew.lines
        await both(training, batch, tuning())
        assert line._version == 1
        added.blocks[2].prompt[0, 0] += 1  # in place, as optimizers do
        got = await both(training, batch, added)
        assert line._version == 2
    assert_same(got, at_once(checkpoint, batch[0], LENGTHS, batch[1], added))


async def test_backward_is_of_what_forward_had(checkpoint, batch, expected):
    added = tuning()
    async with open_training_swarm(checkpoint, CHAINS[2]) as swarm, swarm.training() as training:
        hidden = batch[0].clone()
        output, record = await training.forward(hidden, LENGTHS, added)
        hidden.zero_()
        added.blocks[1].lora["mlp.down_proj"].a.zero_()
        await training.forward(batch[0], LENGTHS, added)
        first = await training.backward(record, batch[1])
        again = await training.backward(record, batch[1])
    assert_same((output, *first), expected)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize(
    "spares", [[("b2", 1, 2)], [("wide", 0, 4)], [("left", 0, 2), ("right", 2, 4)]]
)
async def test_a_hop_dies_and_the_numbers_are_the_same(checkpoint, batch, expected, kind, spares):
    async with open_training_swarm(checkpoint, FOUR) as swarm, swarm.training() as training:
        seen = []

        def die(peer_id, what, stage):
            seen.append(peer_id)
            if peer_id == "b" and what == kind and seen.count("b") > 1:
                swarm.kill("b")
                for spare in spares:
                    swarm.add(*spare)

        swarm.on_start = die
        assert_same(await both(training, batch), expected)
        assert {error.peer_id for error in swarm.failures} == {"b"}


async def test_a_stage_that_nobody_holds_at_once_goes_forward_again(checkpoint, batch, expected):
    async with open_training_swarm(checkpoint, [("wide", 0, 4)]) as swarm:
        async with swarm.training() as training:
            output, record = await training.forward(batch[0], LENGTHS, tuning())
            swarm.kill("wide")
            for span in FOUR:
                swarm.add(*span)
            assert_same((output, *await training.backward(record, batch[1])), expected)
        assert ("forward", (1, 2)) in swarm.peers["b"].starts


async def test_the_way_changes_no_gradient(checkpoint, batch):
    got = []
    for spans in (CHAINS[1], [*CHAINS[2], *FOUR, ("wide", 0, 4)]):
        async with open_training_swarm(checkpoint, spans) as swarm, swarm.training() as training:
            got.append(await both(training, batch))
    (_, grad, grads), (_, other_grad, other_grads) = got
    assert error_of(grad, other_grad) < 1e-6
    assert all(error_of(grads[name], other_grads[name]) < 1e-6 for name in grads)


async def test_micro_batches_are_spread_over_replicas(checkpoint):
    lengths = [64] * 32
    hidden = numbers(64 * 32, HIDDEN)
    async with open_training_swarm(checkpoint, [("a", 0, 4), ("b", 0, 4)]) as swarm:
        async with swarm.training() as training:
            _, record = await training.forward(hidden, lengths)
            await training.backward(record, hidden)
        counts = [len(peer.starts) for peer in swarm.peers.values()]
    assert sum(counts) == 16
    assert min(counts) >= 4


async def test_hidden_states_between_all_blocks(checkpoint, batch):
    spans = [("a", 0, 3), ("b", 3, 4)]
    async with open_training_swarm(checkpoint, spans) as swarm, swarm.training() as training:
        output, record = await training.forward(batch[0], LENGTHS, tuning(), keep_blocks=True)
    states = record.hidden_states
    assert len(states) == 5
    assert torch.equal(states[0], batch[0])
    assert torch.equal(states[-1], output)
    for index, (x, y) in enumerate(pairwise(states)):
        there, _, _ = at_once(checkpoint, x, LENGTHS, batch[1], tuning(), span=(index, index + 1))
        assert error_of(y, there) < CLOSE


async def test_a_part_of_the_model(checkpoint, batch):
    spans = CHAINS[2]
    async with open_training_swarm(checkpoint, spans) as swarm, swarm.training(1, 3) as training:
        got = await both(training, batch)
    part = tuning().within(1, 3)
    assert_same(got, at_once(checkpoint, batch[0], LENGTHS, batch[1], part, span=(1, 3)))


async def test_two_clients_get_what_each_would_get_alone(checkpoint, batch, expected):
    other = tuning(seed=5)
    got = {}
    async with open_training_swarm(checkpoint, CHAINS[2]) as swarm:

        async def client(name, added):
            async with swarm.training() as training:
                for _ in range(2):
                    got[name] = await both(training, batch, added)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client, "one", tuning())
            nursery.start_soon(client, "other", other)
    assert_same(got["one"], expected)
    assert_same(got["other"], at_once(checkpoint, batch[0], LENGTHS, batch[1], other))


async def test_work_waits_for_a_block_and_says_so(checkpoint, batch, expected, autojump_clock):
    said = []
    async with open_training_swarm(checkpoint, FOUR[:3]) as swarm:

        def report(event):
            said.append(event)
            swarm.add("d", 3, 4)

        async with swarm.training(report=report) as training:
            assert_same(await both(training, batch), expected)
    assert "Block 3 is served by nobody." in said[0].why


async def test_nobody_comes(checkpoint, batch, autojump_clock):
    async with open_training_swarm(checkpoint, FOUR[:3]) as swarm, swarm.training() as training:
        with pytest.raises(NoRoute, match="Block 3 is served by nobody"):
            await training.forward(batch[0], LENGTHS)
    assert trio.current_time() > 90


async def test_no_replica_that_accepts_training(checkpoint, batch):
    async with open_training_swarm(checkpoint, CHAINS[2]) as swarm, swarm.training() as training:
        swarm.mute = {"b"}
        with pytest.raises(NoRoute, match="No replica of block 2 accepts this training: It does n"):
            await training.forward(batch[0], LENGTHS)
        swarm.mute.clear()


async def test_what_cannot_be_trained_on(checkpoint, batch):
    hidden, grad = batch
    broken = hidden.clone()
    broken[7, 7] = float("nan")
    bad = tuning()
    bad.blocks[2].lora["mlp.down_proj"].b[0, 0] = float("inf")
    async with open_training_swarm(checkpoint, CHAINS[1]) as swarm, swarm.training() as training:
        for wrong, lengths, why in [
            (hidden[:, :5], LENGTHS, "shape"),
            (hidden.long(), LENGTHS, "int64"),
            (hidden, LENGTHS[1:], "make up"),
            (hidden, [TOKENS, 0], "make up"),
            (hidden, [], "make up"),
            (numbers(2049, HIDDEN), [2049], "A row has 2049 tokens; training takes 2048"),
            (broken, LENGTHS, "The input has numbers that are not finite"),
        ]:
            with pytest.raises(UsageError, match=why):
                await training.forward(wrong, lengths)
        with pytest.raises(UsageError, match=r"mlp.down_proj in block 2 .* not finite"):
            await training.forward(hidden, LENGTHS, bad)
        _, record = await training.forward(hidden, LENGTHS)
        with pytest.raises(UsageError, match="does not fit an output"):
            await training.backward(record, grad[1:])
        with pytest.raises(UsageError, match="The gradient of the output has numbers"):
            await training.backward(record, broken)
        assert_same(
            await both(training, batch, NOTHING),
            at_once(checkpoint, hidden, LENGTHS, grad),
        )


@pytest.mark.parametrize(
    ("spans", "micros"),
    [
        ([("a", 0, 4)], 3),
        ([("a", 0, 4), ("b", 0, 2)], 3),
        ([("a", 0, 4), ("b", 0, 4)], 4),
        ([("a", 0, 2), ("b", 2, 4)], 4),
    ],
)
async def test_one_hop_alone_gets_larger_micro_batches(checkpoint, spans, micros):
    async with open_training_swarm(checkpoint, spans) as swarm, swarm.training() as training:
        _, record = await training.forward(numbers(1024, HIDDEN), [128] * 8)
        assert len(record.micros) == micros
