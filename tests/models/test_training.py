"""Forward and backward through spans against autograd over transformers' model, float32: 1e-4."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnode.errors import LocalProtocolError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.layers.ragged import RaggedBatch, WholeRow
from petalnode.models.loading import load_block_span
from petalnode.models.span import RowSlice, Span
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.rows import TunedRows
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, Tuning

from ..checkpoints import MakeCheckpoint
from .reference import load_reference
from .shapes import SHAPES
from .tuned_reference import (
    LENGTHS,
    TOLERANCE,
    backward,
    backward_pass,
    finish,
    forward,
    load_spans,
    local,
    noise,
    relative_error,
    some_tuning,
    weights,
    worst_error,
)

CASES = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]
FOUR_BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "bloom": SHAPES["bloom"]["untied, odd head"],
    "mixtral": SHAPES["mixtral"]["8 experts, grouped"] | {"num_hidden_layers": 4},
    "gemma2": SHAPES["gemma2"]["odd sizes, five blocks"],
}


def batch(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total = sum(LENGTHS)
    return noise(total, config.hidden_size, seed=7), noise(total, config.hidden_size, seed=8)


@pytest.mark.parametrize(("family", "shape"), CASES, ids=[f"{f}: {s}" for f, s in CASES])
def test_gradients_of_every_family(
    tiny_checkpoint: MakeCheckpoint, family: str, shape: str
) -> None:
    path = tiny_checkpoint(family=family, **SHAPES[family][shape])
    check_gradients(path, [1])


@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 3]], ids=["1 span", "2 spans", "4 spans"])
@pytest.mark.parametrize("family", FOUR_BLOCKS)
def test_gradients_through_spans(
    tiny_checkpoint: MakeCheckpoint, family: str, cuts: list[int]
) -> None:
    check_gradients(tiny_checkpoint(family=family, **FOUR_BLOCKS[family]), cuts)


def test_a_gate_whose_gradient_needs_its_output(tiny_checkpoint: MakeCheckpoint) -> None:
    """ReLU's does, which inference multiplies in place."""
    shape = SHAPES["gemma2"]["grouped, tied"] | {"hidden_activation": "relu"}
    check_gradients(tiny_checkpoint(family="gemma2", **shape), [])


def check_gradients(path: Path, cuts: list[int]) -> None:
    spans = load_spans(path, cuts)
    config = spans[0].config
    (x, grad), tuning = batch(config), some_tuning(config)
    y, grad_x, grads = local(load_reference(path), config, x, LENGTHS, tuning, grad)
    assert relative_error(forward(spans, x, LENGTHS, tuning), y) < TOLERANCE
    keeping = ForwardPass(spans[0], 0, spans[0].end, x, LENGTHS, tuning, keep=True)
    finish(keeping)
    assert torch.equal(keeping.output, forward(spans[:1], x, LENGTHS, tuning))
    ours_x, ours = backward(spans, x, LENGTHS, tuning, grad)
    assert relative_error(ours_x, grad_x) < TOLERANCE
    assert worst_error(ours, grads) < TOLERANCE
    check_against_autograd(spans[-1], tuning)


def check_against_autograd(span: Span, tuning: Tuning) -> None:
    """Bit for bit. Autograd refuses what was changed in place after it was saved; hooks hide that
    from it, so only this shows that no layer does it."""
    (x, grad), leaves = batch(span.config), tuning.leaves(span.device)
    rows = [WholeRow(n, leaves) for n in LENGTHS]
    ragged, tuned = RaggedBatch(rows, span.dtype, span.device), TunedRows(rows)
    first = y = x.to(span.dtype).requires_grad_()
    for index in range(span.start, span.end):
        y = span.run_block(index, y, ragged, tuned)
    named = dict(leaves.within(span.start, span.end).named())
    grad_x, *grads = torch.autograd.grad(y, [first, *named.values()], grad.to(span.dtype))
    ours_x, ours = backward([span], x, LENGTHS, tuning, grad)
    assert torch.equal(ours_x, grad_x)
    assert all(torch.equal(ours[name], one) for name, one in zip(named, grads, strict=True))


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: MakeCheckpoint) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def span(llama: Path) -> Span:
    """Blocks 1 to 4 of 4, so that a confused index shows."""
    return load_block_span(open_checkpoint(str(llama)), 1, 4)


def test_forward_is_what_inference_computes(span: Span) -> None:
    """Bit for bit, with and without a tuning."""
    x, _ = batch(span.config)
    for tuning in (NOTHING, some_tuning(span.config)):
        rows = [RowSlice(span.new_row(1, 4), 0, n, tuning) for n in LENGTHS]
        assert torch.equal(forward([span], x, LENGTHS, tuning), span.forward(x, rows, 1, 4))


def test_one_block_a_step(span: Span) -> None:
    x, grad = batch(span.config)
    one = ForwardPass(span, 2, 4, x, LENGTHS)
    assert one.steps_left == 2
    one.step()
    assert one.steps_left == 1
    assert torch.equal(one.output, forward([part(span, 2, 3)], x, LENGTHS, NOTHING))
    back = backward_pass(span, 2, 4, x, LENGTHS, NOTHING, grad)
    left = []
    while back.steps_left:
        left.append(back.steps_left)
        back.step()
    assert left == [6, 5, 4, 3, 2, 1]
    assert back.tuning_grads == {}


def part(span: Span, start: int, end: int) -> Span:
    """Return a span of some of the blocks."""
    blocks = [one for index in range(start, end) if (one := span.loaded(index)) is not None]
    return Span(span.config, start, blocks, span.dtype, span.device)


def test_passes_take_turns(span: Span) -> None:
    """With each other and with rows that generate, in one span: each gets what it gets alone."""
    x, grad = batch(span.config)
    first, second = some_tuning(span.config, seed=1), some_tuning(span.config, seed=2)
    alone = [backward([span], x, LENGTHS, one, grad) for one in (first, second, NOTHING)]
    plain = span.forward(x[:3], [RowSlice(span.new_row(1, 4), 0, 3)], 1, 4)
    both = [backward_pass(span, 1, 4, x, LENGTHS, one, grad) for one in (first, second, NOTHING)]
    while both[0].steps_left:
        for one in both:
            one.step()
            row = RowSlice(span.new_row(1, 4), 0, 3)
            assert torch.equal(span.forward(x[:3], [row], 1, 4), plain)
    for one, (grad_x, grads) in zip(both, alone, strict=True):
        assert torch.equal(one.grad, grad_x)
        assert one.tuning_grads.keys() == grads.keys()
        assert all(torch.equal(one.tuning_grads[name], grads[name]) for name in grads)


def test_nothing_of_the_callers_changes(span: Span) -> None:
    x, grad = batch(span.config)
    tuning = some_tuning(span.config)
    given = [x, grad, *(tensor for _, tensor in tuning.named())]
    before = [tensor.clone() for tensor in given]
    forward([span], x, LENGTHS, tuning)
    grad_x, grads = backward([span], x, LENGTHS, tuning, grad)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert not any(one.requires_grad for one in (*given, grad_x, *grads.values()))
    assert all(one.grad is None for one in given)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_weights_are_untouched(tiny_checkpoint: MakeCheckpoint, quant: str) -> None:
    span = load_spans(tiny_checkpoint(intermediate_size=128), quant=quant)[0]
    before = checksum(span)
    x, grad = batch(span.config)
    tuning = some_tuning(span.config)
    backward([span], x, LENGTHS, tuning, grad)
    span.forward(x, [RowSlice(span.new_row(0, 4), 0, n, tuning) for n in LENGTHS], 0, 4)
    assert checksum(span) == before
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights(span))


def checksum(span: Span) -> str:
    digest = hashlib.sha256()
    for weight in weights(span):
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_a_failure_leaves_the_span_usable(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = batch(span.config)
    plain = forward([span], x, LENGTHS, NOTHING)
    loaded = span.loaded(2)
    assert loaded is not None

    def fail(*args: object) -> torch.Tensor:
        raise MemoryError

    one = ForwardPass(span, 1, 4, x, LENGTHS, some_tuning(span.config))
    one.step()
    with monkeypatch.context() as patch:
        patch.setattr(loaded.block, "forward", fail)
        with pytest.raises(MemoryError):
            one.step()
    assert torch.equal(forward([span], x, LENGTHS, NOTHING), plain)


def test_parts_of_a_tuning(span: Span) -> None:
    """Only what the span holds and the client sent has a gradient; the rest is no error."""
    x, grad = batch(span.config)
    whole = some_tuning(span.config)
    some = Tuning({0: whole.blocks[0], 2: BlockTuning(prompt=whole.blocks[2].prompt)})
    _, grads = backward([span], x, LENGTHS, some, grad)
    assert list(grads) == ["2.prompt"]


def test_a_prompt_longer_than_every_row(span: Span) -> None:
    x, grad = batch(span.config)
    tuning = Tuning({3: BlockTuning(prompt=noise(40, span.config.hidden_size, seed=3))})
    _, grads = backward([span], x, LENGTHS, tuning, grad)
    assert bool(grads["3.prompt"][:30].any(-1).all())
    assert not bool(grads["3.prompt"][30:].any())


def test_one_token_rows(llama: Path) -> None:
    """The short cut for decoding has gradients too."""
    spans = load_spans(llama)
    config, lengths = spans[0].config, [1] * 9
    x, grad = noise(9, 64, seed=1), noise(9, 64, seed=2)
    tuning = some_tuning(config, tokens=1)
    _, grad_x, grads = local(load_reference(llama), config, x, lengths, tuning, grad)
    ours_x, ours = backward(spans, x, lengths, tuning, grad)
    assert relative_error(ours_x, grad_x) < TOLERANCE
    del ours["0.self_attn.q_proj.a"], grads["0.self_attn.q_proj.a"]
    silent = [name for name, one in grads.items() if not bool(one.any())]
    assert all("q_proj" in name or "k_proj" in name for name in silent), "one key has all weight"
    heard = [name for name in grads if name not in silent and "q_proj" not in name]
    heard = [name for name in heard if "k_proj" not in name]
    assert worst_error({n: ours[n] for n in heard}, {n: grads[n] for n in heard}) < TOLERANCE


def test_a_large_product_that_is_turned_around(tiny_checkpoint: MakeCheckpoint) -> None:
    """Few rows through a large matrix take another way in float32."""
    path = tiny_checkpoint(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8
    )
    spans = load_spans(path)
    x, grad = noise(12, 512, seed=1), noise(12, 512, seed=2)
    tuning = some_tuning(spans[0].config)
    _, grad_x, grads = local(load_reference(path), spans[0].config, x, [12], tuning, grad)
    ours_x, ours = backward(spans, x, [12], tuning, grad)
    assert relative_error(ours_x, grad_x) < TOLERANCE
    assert worst_error(ours, grads) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(llama: Path, dtype: str) -> None:
    """Not further from float32's gradients than 1.25 times what transformers in it is."""
    which = getattr(torch, dtype)
    spans = load_spans(llama, [2], dtype=which)
    config = spans[0].config
    x, grad = batch(config)
    tuning = some_tuning(config)
    exact = local(load_reference(llama), config, x, LENGTHS, tuning, grad)
    theirs = local(
        load_reference(llama, dtype), config, x.to(which), LENGTHS, tuning, grad.to(which)
    )
    grad_x, grads = backward(spans, x, LENGTHS, tuning, grad)
    assert grad_x.dtype == which
    for ours, wanted, other in (
        (grad_x, exact[1], theirs[1]),
        (flat(grads), flat(exact[2]), flat(theirs[2])),
    ):
        assert 0 < relative_error(ours, wanted) < 1.25 * relative_error(other, wanted)


def flat(grads: dict[str, torch.Tensor]) -> torch.Tensor:
    assert all(one.dtype == torch.float32 for one in grads.values())
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def test_inputs_from_inference_mode(span: Span) -> None:
    """Autograd cannot save them; they are copied."""
    with torch.inference_mode():
        x, grad = (one.clone() for one in batch(span.config))
    tuning = some_tuning(span.config)
    plain = batch(span.config)
    ours = backward([span], x, LENGTHS, tuning, grad)
    assert torch.equal(ours[0], backward([span], plain[0], LENGTHS, tuning, plain[1])[0])


def test_what_callers_may_not_do(span: Span) -> None:
    x, grad = batch(span.config)
    for args in (
        (0, 4, x, LENGTHS),
        (1, 1, x, LENGTHS),
        (1, 4, x, LENGTHS[:-1]),
        (1, 4, x[:, :5], LENGTHS),
        (1, 4, x, (*LENGTHS, 0)),
        (1, 4, x[:0], ()),
        (1, 4, x, (sum(LENGTHS) + 1, -1)),
    ):
        with pytest.raises(LocalProtocolError):
            ForwardPass(span, *args)  # type: ignore[arg-type]
        with pytest.raises(LocalProtocolError):
            ForwardPass(span, *args, keep=True)  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError, match="gradient of shape"):
        backward_pass(span, 1, 4, x, LENGTHS, NOTHING, grad[1:])
    with pytest.raises(LocalProtocolError, match="forgot the way"):
        BackwardPass(ForwardPass(span, 1, 4, x, LENGTHS), grad)


def test_steps_end(span: Span) -> None:
    x, _ = batch(span.config)
    one = ForwardPass(span, 1, 4, x, LENGTHS)
    finish(one)
    assert one.steps_left == 0
