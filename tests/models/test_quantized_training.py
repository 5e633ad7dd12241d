"""Gradients of int8 and nf4 spans against bitsandbytes' own layers, held locally, float32.

Gradients pass by what the quantized weights stand for, so that they differ by float rounding alone
(1e-4) where the activations are the same. In whole models those of int8 are rounded again in every
layer, and a different last bit may become a different step (see test_quantize.py): there 1 %.
"""

import pytest
import torch

from petalnode.models import quantize
from petalnode.models.quantize import quantized_linear

from ..checkpoints import MakeCheckpoint
from .bnb_reference import bnb_layer, load_quantized
from .tuned_reference import (
    LENGTHS,
    backward,
    load_spans,
    local,
    noise,
    relative_error,
    some_tuning,
    worst_error,
)

CPU = torch.device("cpu")
BITS = ("int8", "nf4")
TOLERANCES = {"int8": 1e-2, "nf4": 1e-4}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", BITS)
@pytest.mark.parametrize("numbers", [1 << 20, 64 * 10])
def test_a_layer(monkeypatch: pytest.MonkeyPatch, quant: str, dtype: str, numbers: int) -> None:
    """Whole and in pieces, with an outlier, which the other way is none."""
    monkeypatch.setattr(quantize, "EXPANDED_NUMBERS", numbers)
    which = getattr(torch, dtype)
    weight, bias = noise(97, 192, seed=1), noise(97, seed=2).to(which)
    layer = quantized_linear(97, 192, bias, which, CPU, quant)
    assert layer is not None
    layer.fill(0, weight)
    theirs = bnb_layer(weight.to(which), bias, quant)
    x, grad = noise(23, 192, seed=3), noise(23, 97, seed=4).to(which)
    x[3, 8] = 500.0
    ours_x, theirs_x = (x.to(which, copy=True).requires_grad_() for _ in range(2))
    y = layer(ours_x)
    if numbers > 64 * 97 or quant == "int8":
        assert torch.equal(y, theirs(theirs_x))
    with torch.inference_mode():
        assert torch.equal(y, layer(x.to(which))), "a graph changes nothing"
    y.backward(grad)
    theirs(theirs_x).backward(grad)
    assert ours_x.grad is not None
    assert theirs_x.grad is not None
    limit = 1e-5 if dtype == "float32" else 1e-2
    assert relative_error(ours_x.grad, theirs_x.grad) < limit


@pytest.mark.parametrize("quant", BITS)
@pytest.mark.parametrize("cuts", [[], [1, 3]], ids=["1 span", "3 spans"])
def test_a_model(tiny_checkpoint: MakeCheckpoint, quant: str, cuts: list[int]) -> None:
    path = tiny_checkpoint(intermediate_size=128, attention_bias=True, mlp_bias=True)
    spans = load_spans(path, cuts, quant=quant)
    x, grad = noise(sum(LENGTHS), 64, seed=7), noise(sum(LENGTHS), 64, seed=8)
    tuning = some_tuning(spans[0].config)
    if quant == "int8":  # all rows share the columns of outliers: there must be none, or one row
        x, grad, lengths = x[:17], grad[:17], (17,)
    else:
        lengths = LENGTHS  # type: ignore[assignment]
    model = load_quantized(path, quant)
    _, grad_x, grads = local(model, spans[0].config, x, lengths, tuning, grad)
    ours_x, ours = backward(spans, x, lengths, tuning, grad)
    assert relative_error(ours_x, grad_x) < TOLERANCES[quant]
    assert worst_error(ours, grads) < TOLERANCES[quant]
