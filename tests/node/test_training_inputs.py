"""What callers give to a training session: other numbers, nonsense, two at once, too late."""

import warnings

import numpy as np
import pytest
import torch
import trio
import trio.testing

from petalnode.errors import UsageError
from petalnode.models.tuning.tuning import Tuning
from petalnode.training.inputs import check_mask

from .training_swarm import DEADLINE_S, FOUR, HIDDEN, Inline, numbers, open_training_swarm, tuning


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def x():
    return numbers(5, HIDDEN)


class Gated(Inline):
    """A thread that is slow to give back what it did first while there is a gate."""

    def __init__(self):
        self.gate = None

    async def run(self, function, load=0):
        result = await super().run(function, load)
        if self.gate is not None:
            gate, self.gate = self.gate, None
            await gate.wait()
        return result


async def test_two_tunings_of_two_tasks(checkpoint, x):
    """One compares its tuning, which is known, while the other sends another: both get theirs."""
    async with open_training_swarm(checkpoint, FOUR) as swarm:
        swarm._compute = Gated()
        async with swarm.training() as training:
            expected, _ = await training.forward(x, [5], tuning(1))
            gate = swarm._compute.gate = trio.Event()
            outputs = []

            async def again():
                outputs.append((await training.forward(x, [5], tuning(1)))[0])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(again)
                await trio.testing.wait_all_tasks_blocked()
                other, _ = await training.forward(x, [5], tuning(2))
                gate.set()
    assert torch.equal(outputs[0], expected)
    assert not torch.equal(outputs[0], other)


KINDS = [torch.tensor([2, 3]), list(torch.tensor([2, 3])), np.array([2, 3]), list(np.array([2, 3]))]


@pytest.mark.parametrize("lengths", KINDS, ids=["tensor", "of tensor", "array", "of array"])
async def test_lengths_of_other_kinds(checkpoint, x, lengths):
    async with open_training_swarm(checkpoint, FOUR) as swarm, swarm.training() as training:
        expected, _ = await training.forward(x, [2, 3])
        assert torch.equal((await training.forward(x, lengths))[0], expected)


NO_LENGTHS = [5, None, "23", [2.0, 3.0], torch.tensor(5), torch.ones(2, dtype=int, device="meta")]


@pytest.mark.parametrize("lengths", NO_LENGTHS, ids=str)
async def test_lengths_that_are_none(checkpoint, x, lengths):
    await refuses(checkpoint, "no whole numbers", x, lengths)


def nested():
    with warnings.catch_warnings(action="ignore"):  # the library's: that may change
        return torch.nested.nested_tensor([torch.zeros(3, HIDDEN), torch.zeros(2, HIDDEN)])


NO_NUMBERS = {
    "a list": ([[0.0] * HIDDEN] * 5, "is a list"),
    "float8": (torch.zeros(5, HIDDEN, dtype=torch.float8_e4m3fn), "float8.*cannot be trained"),
    "whole": (torch.zeros(5, HIDDEN, dtype=torch.int64), "int64.*cannot be trained"),
    "sparse": (torch.zeros(5, HIDDEN).to_sparse(), "sparse"),
    "meta": (torch.zeros(5, HIDDEN, device="meta"), "meta device"),
    "nested": (nested(), "nested"),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
async def test_hidden_states_that_are_no_numbers(checkpoint, kind):
    hidden, why = NO_NUMBERS[kind]
    await refuses(checkpoint, why, hidden, [5])


@pytest.mark.parametrize("kind", NO_NUMBERS)
async def test_gradients_that_are_no_numbers(checkpoint, x, kind):
    grad, why = NO_NUMBERS[kind]
    async with open_training_swarm(checkpoint, FOUR) as swarm, swarm.training() as training:
        _, record = await training.forward(x, [5])
        with pytest.raises(UsageError, match=why):
            await training.backward(record, grad)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_dtype(dtype):
    mask = check_mask(torch.tensor([[1, 1, 0]]).to(dtype), 1, 3)
    assert (mask.dtype, mask.tolist()) == (torch.bool, [[True, True, False]])


@pytest.mark.parametrize("other", [2.0, -1.0, 0.5, float("nan"), float("-inf")])
def test_masks_with_other_numbers(other):
    """Added to scores, 0 would mean a token and less padding: the opposite."""
    with pytest.raises(UsageError, match="other numbers than 0 and 1"):
        check_mask(torch.tensor([[1.0, 0.0, other]]), 1, 3)


@pytest.mark.parametrize("block", [-1, 4])
async def test_an_adapter_of_another_model(checkpoint, x, block):
    """Its parts for blocks that are not there are not forgotten silently."""
    other = Tuning({block: tuning().blocks[0]})
    await refuses(checkpoint, f"part for block {block}, but", x, [5], other)


@pytest.mark.parametrize("added", [None, {0: 1}], ids=str)
async def test_what_is_no_tuning(checkpoint, x, added):
    await refuses(checkpoint, "cannot be added", x, [5], added)


async def refuses(checkpoint, why, *given):
    """It says why, and goes on with what is right."""
    async with open_training_swarm(checkpoint, FOUR) as swarm, swarm.training() as training:
        with pytest.raises(UsageError, match=why):
            await training.forward(*given)
        output, _ = await training.forward(numbers(5, HIDDEN), [5])
        assert output.shape == (5, HIDDEN)


async def test_records_of_nobody_and_of_another_session(checkpoint, x):
    async with (
        open_training_swarm(checkpoint, FOUR) as swarm,
        swarm.training() as one,
        swarm.training() as other,
    ):
        _, record = await other.forward(x, [5], tuning())
        for wrong in (None, record):
            with pytest.raises(UsageError, match="a record of its own"):
                await one.backward(wrong, x)
        await other.backward(record, x)


async def test_a_session_that_is_closed(checkpoint, x):
    async with open_training_swarm(checkpoint, FOUR) as swarm:
        async with swarm.training() as training:
            _, record = await training.forward(x, [5])
        with pytest.raises(UsageError, match="was closed"):
            await training.forward(x, [5])
        with pytest.raises(UsageError, match="was closed"):
            await training.backward(record, x)


@pytest.mark.parametrize("passed", range(0, 60, 3))
async def test_a_session_that_is_closed_meanwhile(checkpoint, x, passed):
    """A task outside it is told, wherever it is just then."""
    async with open_training_swarm(checkpoint, FOUR) as swarm, trio.open_nursery() as nursery:

        async def again_and_again():
            while True:
                await training.forward(x, [5])

        async def outside():
            with pytest.raises(UsageError, match="was closed"):
                await again_and_again()

        async with swarm.training() as training:
            nursery.start_soon(outside)
            for _ in range(passed):
                await trio.lowlevel.checkpoint()
        with trio.fail_after(DEADLINE_S):
            for peer in swarm.peers.values():
                await peer.server.wait_idle()


async def test_a_session_that_is_closed_opens_nothing_more(checkpoint, x, monkeypatch):
    """Whoever waited for the same hop to be opened does not open it again."""
    async with open_training_swarm(checkpoint, [("a", 0, 4)]) as swarm:
        opened, gate, open_stream = [], trio.Event(), swarm.open_stream

        async def slowly(peer_id, protocol):
            opened.append(peer_id)
            await gate.wait()
            return await open_stream(peer_id, protocol)

        monkeypatch.setattr(swarm, "open_stream", slowly)

        async def outside():
            with pytest.raises(UsageError, match="was closed"):
                await training.forward(x, [5])

        async with trio.open_nursery() as nursery:
            async with swarm.training() as training:
                for _ in range(2):
                    nursery.start_soon(outside)
                await trio.testing.wait_all_tasks_blocked()
            gate.set()
    assert opened == ["a"]


async def test_who_waits_for_peers_is_told_at_once_of_a_session_that_is_closed(
    checkpoint, x, autojump_clock
):
    told = []
    async with open_training_swarm(checkpoint) as swarm, trio.open_nursery() as nursery:

        async def outside():
            with pytest.raises(UsageError, match="was closed"):
                await training.forward(x, [5])
            told.append(trio.current_time())

        async with swarm.training() as training:
            nursery.start_soon(outside)
            await trio.sleep(0.25)
        closed = trio.current_time()
    assert told == [closed]
