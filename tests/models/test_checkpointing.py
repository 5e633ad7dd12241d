"""What passes keep and compute again (checkpointing): no more than they say, and not a bit else."""

import ctypes
import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from petalnode.errors import LocalProtocolError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span
from petalnode.models.span import Span
from petalnode.models.training import NODE_BYTES, BackwardPass, ForwardPass, _Saved
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.tuning import NOTHING, Tuning

from ..checkpoints import MakeCheckpoint
from .shapes import SHAPES
from .tuned_reference import (
    LENGTHS,
    backward,
    finish,
    forward,
    load_spans,
    noise,
    some_tuning,
    weights,
)


@pytest.fixture(scope="module")
def span(tiny_checkpoint: MakeCheckpoint) -> Span:
    """Blocks 1 to 4 of 4, so that a confused index shows."""
    return load_block_span(open_checkpoint(str(tiny_checkpoint())), 1, 4)


def batch(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total = sum(LENGTHS)
    return noise(total, config.hidden_size, seed=7), noise(total, config.hidden_size, seed=8)


def kept_pass(span: Span, tuning: Tuning = NOTHING) -> ForwardPass:
    """Return one that went forward to its end."""
    one = ForwardPass(span, span.start, span.end, batch(span.config)[0], LENGTHS, tuning, keep=True)
    finish(one)
    return one


def test_steps_after_a_forward_pass(span: Span) -> None:
    """Two a block; it gives what a pass gives that has to go forward first, bit for bit."""
    x, grad = batch(span.config)
    tuning = some_tuning(span.config)
    plain = backward([span], x, LENGTHS, tuning, grad)
    one = ForwardPass(span, 1, 4, x, LENGTHS, tuning, keep=True)
    finish(one)
    assert torch.equal(one.output, forward([span], x, LENGTHS, tuning))
    back = BackwardPass(one, grad)
    left = []
    while back.steps_left:
        left.append(back.steps_left)
        back.step()
    assert left == [6, 5, 4, 3, 2, 1]
    assert torch.equal(back.grad, plain[0])
    assert all(torch.equal(back.tuning_grads[name], plain[1][name]) for name in plain[1])


def test_activations_are_held_for_one_block_at_a_time(span: Span) -> None:
    """None after the forward pass, and of the block that is gone through while it is."""
    x, grad = batch(span.config)
    one = ForwardPass(span, 1, 4, x, LENGTHS, some_tuning(span.config), keep=True)
    finish(one)
    assert one.kept is not None
    saved = [block._saved for block in one.kept]
    assert all(len(each.noted) > 10 for each in saved)
    back = BackwardPass(one, grad)
    while back.steps_left:
        held = [bool(each.tensors) for each in saved if each is not None]
        assert sum(held) == back.steps_left % 2
        back.step()
        saved = [block._saved for block in one.kept]
    assert saved == []


class Products(TorchDispatchMode):
    """Counts matrix products that are really computed."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        self.count += func is torch.ops.aten.mm.default
        result: torch.Tensor = func(*args, **(kwargs or {}))
        return result


def test_the_last_product_is_not_computed_again(span: Span) -> None:
    """Nobody needs it: the gradient that comes in is that of its output."""
    x, grad = batch(span.config)
    back = BackwardPass(ForwardPass(span, 1, 2, x, LENGTHS, keep=True), grad)
    counted = []
    while back.steps_left:
        with Products() as products:
            back.step()
        counted.append(products.count)
    assert counted == [4, 3, 4], "forward; again, without the last; back"


@pytest.mark.parametrize(
    ("again", "why"),
    [(lambda x: x.double().sin().float(), "something else"), (lambda x: x * 2, "less")],
)
def test_a_block_that_is_not_the_same_again(
    span: Span, monkeypatch: pytest.MonkeyPatch, again: Any, why: str
) -> None:
    """Rather no gradient than a wrong one."""
    x, grad = batch(span.config)
    loaded = span.loaded(1)
    assert loaded is not None
    monkeypatch.setattr(loaded.block, "forward", lambda x, _: x.sin().cos())
    one = ForwardPass(span, 1, 2, x, LENGTHS, keep=True)
    one.step()
    monkeypatch.setattr(loaded.block, "forward", lambda x, _: again(x))
    with pytest.raises(LocalProtocolError, match=f"computed {why} the second time"):
        BackwardPass(one, grad).step()


def test_what_is_kept_ends_with_the_pass(span: Span) -> None:
    """No tensor keeps the graph alive that keeps it; nothing waits for the garbage collector."""
    x, grad = batch(span.config)
    one = ForwardPass(span, 1, 4, x, LENGTHS, some_tuning(span.config), keep=True)
    finish(one)
    back = BackwardPass(one, grad)
    back.step()
    assert one.kept is not None
    known = [weakref.ref(one.kept[0].x), weakref.ref(one.kept[-1]._saved.tensors[-1])]
    assert all(ref() is not None for ref in known)
    gc.disable()
    try:
        del back, one
        assert all(ref() is None for ref in known)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", "grouped"), ("mistral", "window, grouped"), ("bloom", "four heads")],
)
@pytest.mark.parametrize("lengths", [[1] * 64, [300]], ids=["many rows", "a long one"])
def test_what_is_kept_is_counted(
    tiny_checkpoint: MakeCheckpoint, family: str, shape: str, lengths: list[int]
) -> None:
    """Inputs, and some memory for each node of the graphs; no masks, which nobody counts."""
    span = load_spans(tiny_checkpoint(family=family, **SHAPES[family][shape]))[0]
    x, blocks = noise(sum(lengths), span.config.hidden_size, seed=1), span.end
    tuning = some_tuning(span.config)
    plain, tuned, half = (
        ForwardPass(span, 0, blocks, x, lengths, one, keep=True)
        for one in (NOTHING, tuning, tuning.map(lambda tensor: tensor.bfloat16()))
    )
    assert plain.nbytes == 0
    for one in (plain, tuned, half):
        finish(one)
        tensors, graphs = (blocks + 1) * x.nbytes, 5 * blocks * len(lengths) * NODE_BYTES
        assert one.nbytes > tensors + graphs
        batch = one.blocks._batch
        assert not batch._masks
        assert not batch._angles
    assert tuned.nbytes > plain.nbytes + 30 * blocks * NODE_BYTES
    assert half.nbytes == tuned.nbytes + tuning.nbytes


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_activations_ahead_of_the_gradient(span: Span, ahead: int) -> None:
    """A step less for every block that has them, the last blocks first, and the same bits."""
    x, grad = batch(span.config)
    tuning = some_tuning(span.config)
    plain = backward([span], x, LENGTHS, tuning, grad)
    one = kept_pass(span, tuning)
    for _ in range(ahead):
        assert one.next_activations > 0
        one.restore()
    assert (one.next_activations == 0) == (ahead == 3)
    assert one.kept is not None
    assert [block.restored for block in one.kept] == [number >= 3 - ahead for number in range(3)]
    back = BackwardPass(one, grad)
    steps = []
    while back.steps_left:
        steps.append(back.steps_left)
        back.step()
    assert steps == [*range(6 - ahead, 0, -1)]
    assert torch.equal(back.grad, plain[0])
    assert all(torch.equal(back.tuning_grads[name], plain[1][name]) for name in plain[1])


def test_activations_that_were_let_go_come_again(span: Span) -> None:
    x, grad = batch(span.config)
    one = kept_pass(span)
    brought = []
    for _ in range(2):
        brought.append(one.next_activations)
        one.restore()
    assert one.kept is not None
    known = [weakref.ref(block._saved.tensors[-1]) for block in one.kept[1:]]
    assert one.let_go() == brought[1], "that of the block which is gone through later"
    assert [ref() is None for ref in known] == [True, False]
    assert (one.let_go(), one.let_go()) == (brought[0], 0)
    assert known[1]() is None
    back = BackwardPass(one, grad)
    assert back.steps_left == 6
    finish(back)
    assert torch.equal(back.grad, backward([span], x, LENGTHS, NOTHING, grad)[0])


def test_an_attempt_that_fails_leaves_nothing_behind(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, in the midst of a block: the next attempt takes everything again."""
    x, grad = batch(span.config)
    one, take, taken = kept_pass(span), _Saved.take, 0

    def failing(saved: Any, tensor: torch.Tensor) -> int:
        nonlocal taken
        taken += 1
        if taken > 7:
            raise MemoryError
        return take(saved, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(_Saved, "take", failing)
        with pytest.raises(MemoryError):
            one.restore()
    assert one.kept is not None
    assert not one.kept[-1]._saved.tensors
    back = BackwardPass(one, grad)
    finish(back)
    assert torch.equal(back.grad, backward([span], x, LENGTHS, NOTHING, grad)[0])


def test_nothing_is_ahead_of_a_pass_that_keeps_nothing(span: Span) -> None:
    one = ForwardPass(span, 1, 4, batch(span.config)[0], LENGTHS)
    assert one.next_activations == 0
    one.restore()
    one.let_go()
    finish(one)
    assert one.next_activations == 0


def places(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return where tensors lie, and how many bytes are there."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("rank", [0, 16], ids=["plain", "LoRA"])
@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", SHAPES)
def test_activations_are_counted(
    tiny_checkpoint: MakeCheckpoint, family: str, quant: str, rank: int
) -> None:
    """Not much more bytes than they take: no weights, nothing that is added, no masks that stay."""
    shape = next(iter(SHAPES[family].values()))
    span = load_spans(tiny_checkpoint(family=family, **shape), quant=quant)[0]
    rng, tuning = torch.Generator().manual_seed(0), NOTHING
    if rank:
        tuning = new_lora(span.config, rank=rank, alpha=8.0, targets="all-linear", rng=rng)
    one = kept_pass(span, tuning)
    held = places([*weights(span), *(tensor for _, tensor in one.blocks.tuning.named())])
    while said := one.next_activations:
        before = {id(block) for block in one.kept or () if block.restored}
        one.restore()
        (block,) = (b for b in one.kept or () if b.restored and id(b) not in before)
        saved = places(block._saved.tensors)
        new = saved.keys() - held.keys() - places([block.x]).keys()
        taken = sum(saved[place] for place in new)
        assert 0.9 * taken <= said <= 1.6 * taken
        assert not one.blocks._batch._masks


HEAP_FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class HeapUse(ctypes.Structure):
    """What glibc says of its heap (`mallinfo2`)."""

    _fields_ = [(name, ctypes.c_size_t) for name in HEAP_FIELDS]


def taken_by_c(make: Callable[[], object]) -> int:
    """Return the bytes that C code takes from the heap for what is made, torch's included."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapUse
    gc.collect()
    before = mallinfo2()
    made = make()
    after = mallinfo2()
    del made
    return int(after.uordblks + after.hblkhd - before.uordblks - before.hblkhd)


def taken_by_python(make: Callable[[], object]) -> int:
    """Return the bytes of Python objects in what is made."""
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del made
    return taken


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc tells what is allocated"
)
@pytest.mark.parametrize("lengths", [[1] * 64, [2] * 32, [64]], ids=["ones", "pairs", "one row"])
def test_a_node_of_a_graph_takes_less_than_is_counted(span: Span, lengths: list[int]) -> None:
    """But not much less: that would be room counted away.

    What the heap holds is the whole process's: the middle of three, as other things come free.
    """
    x = noise(64, span.config.hidden_size, seed=1)

    def kept() -> ForwardPass:
        one = ForwardPass(span, 1, 4, x, lengths, keep=True)
        finish(one)
        return one

    def many() -> list[ForwardPass]:
        return [kept() for _ in range(10)]

    blocks = kept().kept or []
    tensors, nodes = sum(one.y.nbytes for one in blocks), sum(one.nodes for one in blocks)
    taken = median(taken_by_c(many) for _ in range(3)) + taken_by_python(many)
    each = (taken / 10 - tensors) / nodes
    assert NODE_BYTES / 2 < each < NODE_BYTES
