"""Linear layers in fewer bits, by bitsandbytes: LLM.int8() and NF4.

`int8` (arXiv 2208.07339): a scale for each row of the weight and for each token; columns in which a
token of the batch reaches `OUTLIER` are multiplied as they are. Tokens that share a batch share
those columns, so a result depends on its batch, within the error of the quantization.
`nf4` (arXiv 2305.14314): 4 bits, a scale for each 64 numbers of a row, without double quantization;
weights are expanded for each product.

Matrices are quantized slice by slice while they are read, so that scratch memory stays small.
bitsandbytes is imported with the first layer, because that takes twice as long as torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from petalnode.errors import ModelError, UsageError
from petalnode.models.memory import NF4_GROUP, QUANTS, is_quantized

OUTLIER = 6.0
"""Activations from here on are outliers; the paper's value."""
SLICE_NUMBERS = 1 << 18
"""Numbers of a matrix that are quantized at a time; some 20 bytes of scratch memory for each."""
EXPANDED_NUMBERS = 1 << 20
"""Numbers of an NF4 matrix that a CPU expands at a time."""


def check_quant(quant: str, device: torch.device) -> None:
    """Raise `UsageError` for a quantization that does not exist or cannot run here."""
    if quant not in QUANTS:
        raise UsageError(
            f"There is no quantization {quant!r}.", f"Choose one of {', '.join(QUANTS)}."
        )
    if quant == "none":
        return
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"Quantization to {quant} does not run on the device {device.type}.",
            "Leave --quant out, or use --device cpu or cuda.",
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"Quantization to {quant} needs the package bitsandbytes, which is not installed.",
            "Install it with `pip install bitsandbytes`, or leave --quant out.",
        )


def quantized_linear(
    outputs: int,
    inputs: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    quant: str,
) -> Int8Linear | Nf4Linear | None:
    """Return an empty layer [out, in], or None where such a matrix is not quantized."""
    if not is_quantized(inputs, quant):
        return None
    kind = Int8Linear if quant == "int8" else Nf4Linear
    return kind(outputs, inputs, bias, dtype, device)


class Int8Linear:
    """A linear layer whose weight is int8 [out, in] with float32 scales [out]."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.bias, self._dtype = bias, dtype
        self._weight = torch.empty((outputs, inputs), dtype=torch.int8, device=device)
        self._scales = torch.empty(outputs, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self._weight.nbytes + self._scales.nbytes + bias

    def fill(self, begin: int, rows: Tensor) -> None:
        """Keep rows [n, in] of a checkpoint's tensor as the rows from `begin` on."""
        quantize = _bitsandbytes().functional.int8_vectorwise_quant
        for at, some in _slices(rows):
            half = some.to(self._weight.device, self._dtype).to(torch.float16)
            weight, scales, _ = quantize(half)
            _check_finite(scales, "int8")
            place = slice(begin + at, begin + at + len(some))
            self._weight[place], self._scales[place] = weight, scales

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in]."""
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _Int8Product.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in], without a graph."""
        flat = x.reshape(-1, x.shape[-1])
        quantize = _bitsandbytes().functional.int8_vectorwise_quant
        half = flat.to(torch.float16).contiguous()
        whole, scales, outliers = quantize(half, threshold=OUTLIER)
        out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            flat, whole, self._weight, scales, self._scales, outliers, self.bias
        )
        y: Tensor = out if x.ndim == 2 else out.view(*x.shape[:-1], -1)
        return y

    def turned(self, grad: Tensor) -> Tensor:
        """Return the gradient [..., in] of x for that of the output [..., out].

        As if the weight were what it stands for; some rows of it are expanded at a time.
        """
        grad_x = grad.new_zeros((*grad.shape[:-1], self._weight.shape[1]))
        scales = (self._scales / 127).unsqueeze(1)
        step = max(1, EXPANDED_NUMBERS // self._weight.shape[1])
        for at in range(0, len(self._weight), step):
            rows = self._weight[at : at + step] * scales[at : at + step]
            grad_x += grad[..., at : at + step] @ rows.to(grad.dtype)
        return grad_x


class _Int8Product(torch.autograd.Function):
    """The product of an `Int8Linear`, which rounds; its gradient does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.turned(grads[0]), None


class Nf4Linear:
    """A linear layer whose weight is 4 bits a number with a float32 scale for each 64."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.bias, self._dtype, self._inputs = bias, dtype, inputs
        groups = inputs // NF4_GROUP
        self._weight = torch.empty((outputs, inputs // 2), dtype=torch.uint8, device=device)
        self._scales = torch.empty((outputs, groups), dtype=torch.float32, device=device)
        # Of large matrices some rows at a time: expanded numbers then stay in the CPU's cache,
        # which halves the time, and take no memory to speak of. GPUs expand in their kernels.
        step = outputs if device.type == "cuda" else max(1, EXPANDED_NUMBERS // inputs)
        self._pieces = [self._piece(at, at + step) for at in range(0, outputs, step)]

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self._weight.nbytes + self._scales.nbytes + bias

    def fill(self, begin: int, rows: Tensor) -> None:
        """Keep rows [n, in] of a checkpoint's tensor as the rows from `begin` on."""
        quantize = _bitsandbytes().functional.quantize_4bit
        for at, some in _slices(rows):
            here = some.to(self._weight.device, self._dtype).contiguous()
            packed, state = quantize(here, blocksize=NF4_GROUP, quant_type="nf4")
            _check_finite(state.absmax, "nf4")
            place = slice(begin + at, begin + at + len(some))
            self._weight[place] = packed.view(len(some), -1)
            self._scales[place] = state.absmax.view(len(some), -1)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in]."""
        multiply = _bitsandbytes().matmul_4bit
        outs = [multiply(x, packed, state, bias=bias) for packed, state, bias in self._pieces]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def _piece(self, begin: int, end: int) -> tuple[Tensor, Any, Tensor | None]:
        """Return views of some rows, as bitsandbytes takes them."""
        weight, bias = self._weight[begin:end], self.bias
        state = _bitsandbytes().functional.QuantState(
            absmax=self._scales[begin:end].view(-1),
            shape=torch.Size((len(weight), self._inputs)),
            code=_nf4_code(weight.device),
            blocksize=NF4_GROUP,
            quant_type="nf4",
            dtype=self._dtype,
        )
        return weight.view(-1, 1), state, None if bias is None else bias[begin:end]


def _slices(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield a few rows at a time, with where they begin."""
    step = max(1, SLICE_NUMBERS // rows.shape[1])
    for at in range(0, len(rows), step):
        yield at, rows[at : at + step]


def _check_finite(scales: Tensor, quant: str) -> None:
    if not bool(scales.isfinite().all()):
        raise ModelError(
            f"A matrix of the checkpoint holds numbers that are no finite numbers in {quant}.",
            "Leave --quant out, or use an undamaged checkpoint.",
        )


@cache
def _nf4_code(device: torch.device) -> Tensor:
    code: Tensor = _bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return code


@cache
def _bitsandbytes() -> Any:
    # It warns, on import, of an optional package that it would load code from the hub with.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
