"""Real layers: memory for weights, and where each tensor of a checkpoint goes in it.

Every weight is [out, in]. See `petalnode.models.layers.parts` for how blocks ask for layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.models.layers.adapted import AdaptedLinear, Additions
from petalnode.models.layers.experts import GroupedLinear, Mxfp4Fill, StackedFill
from petalnode.models.layers.linear import linear
from petalnode.models.layers.norms import rms_norm
from petalnode.models.layers.parts import named_sizes
from petalnode.models.quantize import Int8Linear, Nf4Linear, quantized_linear

Layer = Callable[[Tensor], Tensor]
Fill = Callable[[Tensor], object]
"""Takes a tensor of the checkpoint, in its shape and dtype, and keeps a copy of what it needs."""

VOCABULARY_SLICE = 8192
"""Rows of a head that are converted at a time."""


def _silu(x: Tensor) -> Tensor:
    """In the memory of x, unless a gradient may need that later."""
    return F.silu(x, inplace=not x.requires_grad)


_ACTIVATIONS: dict[str, Layer] = {
    "silu": _silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Linear:
    """A linear layer [out, in] with an optional bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in]."""
        return linear(x, self.weight, self.bias)

    def fill(self, begin: int, rows: Tensor) -> None:
        """Keep rows [n, in] of a checkpoint's tensor as the rows from `begin` on."""
        self.weight[begin : begin + len(rows)] = rows

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


AnyLinear = Linear | Int8Linear | Nf4Linear


class VocabularyMatrix:
    """Embeddings or head [V, H], kept in the checkpoint's dtype or the activations', if smaller.

    Where the two differ, the product converts a slice of the vocabulary at a time: what a converted
    copy of the whole would give, without its memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._table_VH = torch.empty((0, 0), dtype=dtype, device=device)

    def fill(self, tensor: Tensor) -> None:
        """Keep a copy of the checkpoint's tensor."""
        smaller = min(tensor.dtype, self._dtype, key=lambda dtype: dtype.itemsize)
        self._table_VH = tensor.to(self._table_VH.device, smaller, copy=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._table_VH.nbytes

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the rows [T, H] of token ids [T], in the dtype of the activations."""
        return F.embedding(ids.to(self._table_VH.device), self._table_VH).to(self._dtype)

    def project(self, x: Tensor) -> Tensor:
        """Return the product [T, V] of x [T, H] with every row, in float32."""
        if self._table_VH.dtype == self._dtype:
            return linear(x, self._table_VH, None).float()
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = ConvertedProduct.apply(x, self._table_VH)  # type: ignore[no-untyped-call]
            return y
        return _by_slices(x, self._table_VH)


def _by_slices(x: Tensor, table_VH: Tensor) -> Tensor:
    slices = torch.split(table_VH, VOCABULARY_SLICE)
    return torch.cat([linear(x, one.to(x.dtype), None).float() for one in slices], -1)


class ConvertedProduct(torch.autograd.Function):
    """The product with a table of another dtype, whose converted slices no graph shall keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table_VH: Tensor) -> Tensor:
        ctx.table_VH, ctx.dtype = table_VH, x.dtype
        return _by_slices(x, table_VH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_TV = grads[0].to(ctx.dtype)
        grad_x = grad_TV.new_zeros((*grad_TV.shape[:-1], ctx.table_VH.shape[1]))
        slices = torch.split(ctx.table_VH, VOCABULARY_SLICE)
        for grad, one in zip(torch.split(grad_TV, VOCABULARY_SLICE, -1), slices, strict=True):
            grad_x += grad @ one.to(ctx.dtype)
        return grad_x, None


class TorchParts:
    """Makes layers in one dtype on one device; `targets`: where a checkpoint's tensors go.

    `additions`: what rows add to the linear layers made here, but routers, heads and experts.
    `quant`: how linear layers keep their weights, one of `petalnode.models.memory.QUANTS`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, quant: str = "none") -> None:
        self.targets: dict[str, Fill] = {}
        self.additions = Additions()
        self.device = device
        self._dtype, self._quant = dtype, quant
        self._made: list[AnyLinear | VocabularyMatrix | Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all weights made here."""
        return sum(one.nbytes for one in self._made)

    @property
    def storages(self) -> frozenset[int]:
        """Where the weights lie that autograd may save: those that are not quantized."""
        dense = [one for one in self._made if isinstance(one, Tensor)]
        layers = [one for one in self._made if isinstance(one, Linear)]
        dense += [one.weight for one in layers]
        dense += [one.bias for one in layers if one.bias is not None]
        return frozenset(map(storage_of, dense))

    def linear(
        self,
        names: str | Sequence[str],
        outputs: int | Sequence[int],
        inputs: int,
        *,
        bias: bool = False,
        row_order: Sequence[int] | None = None,
        dense: bool = False,
    ) -> Layer:
        """See `Parts.linear`."""
        order = None if row_order is None else torch.tensor(row_order, device=self.device)
        layer = self._named_linear(names, outputs, inputs, bias, order, dense=dense)
        if dense:
            return layer
        return AdaptedLinear(layer, self.additions, list(named_sizes(names, outputs)), order)

    def _named_linear(
        self,
        names: str | Sequence[str],
        outputs: int | Sequence[int],
        inputs: int,
        bias: bool,
        order: Tensor | None,
        *,
        dense: bool = False,
    ) -> AnyLinear:
        sizes = list(named_sizes(names, outputs))
        total = sum(size for _, size in sizes)
        layer = self._layer(total, inputs, self._empty(total) if bias else None, dense=dense)
        order = None if order is None else order.cpu()
        at = 0
        for name, size in sizes:
            self.targets[f"{name}.weight"] = partial(_fill_rows, layer, at, order)
            if layer.bias is not None:
                self.targets[f"{name}.bias"] = partial(_fill, layer.bias[at : at + size], order)
            at += size
        return layer

    def experts(
        self, names: str | Sequence[str], experts: int, outputs: int | Sequence[int], inputs: int
    ) -> GroupedLinear:
        """See `Parts.experts`."""
        many = [names] if isinstance(names, str) else names
        return GroupedLinear(
            [
                self._named_linear(
                    [name.format(expert) for name in many], outputs, inputs, False, None
                )
                for expert in range(experts)
            ]
        )

    def stacked_experts(
        self,
        name: str,
        experts: int,
        outputs: int,
        inputs: int,
        *,
        row_order: Sequence[int] | None = None,
        mxfp4: bool = False,
    ) -> GroupedLinear:
        """See `Parts.stacked_experts`."""
        bias_EO = self._empty(experts, outputs)
        layers = [self._layer(outputs, inputs, bias_O) for bias_O in bias_EO]
        order = None if row_order is None else torch.tensor(row_order)
        self.targets[f"{name}_bias"] = partial(_fill_columns, bias_EO, order)
        if mxfp4:
            packed = Mxfp4Fill(layers, order)
            self.targets |= {f"{name}_scales": packed.scales, f"{name}_blocks": packed.blocks}
        else:
            self.targets[name] = StackedFill(layers, order).weights
        return GroupedLinear(layers)

    def rms_norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> Layer:
        """See `Parts.rms_norm`."""
        if plus_one:
            return self._float32_norm(f"{name}.weight", size, eps)
        weight = self.vector(f"{name}.weight", size)
        return lambda x: rms_norm(x, weight, eps)

    def _float32_norm(self, name: str, size: int, eps: float) -> Layer:
        weight = torch.empty(size, dtype=torch.float32, device=self.device)
        self._made.append(weight)
        self.targets[name] = lambda tensor: weight.copy_(tensor.to(self._dtype)).add_(1.0)
        return lambda x: rms_norm(x.float(), weight, eps).to(x.dtype)

    def layer_norm(self, name: str, size: int, eps: float, *, affine: bool = True) -> Layer:
        """See `Parts.layer_norm`."""
        if not affine:
            return lambda x: F.layer_norm(x, (size,), eps=eps)
        weight, bias = self.vector(f"{name}.weight", size), self.vector(f"{name}.bias", size)
        return lambda x: F.layer_norm(x, (size,), weight, bias, eps)

    def vector(self, name: str, *shape: int) -> Tensor:
        """See `Parts.vector`."""
        made = self._empty(*shape)
        self._made.append(made)
        self.targets[name] = made.copy_
        return made

    def vocabulary(self, name: str, size: int, hidden: int) -> VocabularyMatrix:
        """See `Parts.vocabulary`."""
        table = VocabularyMatrix(self._dtype, self.device)
        self._made.append(table)
        self.targets[name] = table.fill
        return table

    def constant(self, values: Sequence[float]) -> Tensor:
        """See `Parts.constant`."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def activation(self, name: str) -> Layer:
        """See `Parts.activation`."""
        return _ACTIVATIONS[name]

    def _layer(
        self, outputs: int, inputs: int, bias: Tensor | None, *, dense: bool = False
    ) -> AnyLinear:
        """Return an empty layer [out, in] in the form that weights are kept in here."""
        layer: AnyLinear | None = None
        if not dense and self._quant != "none":
            layer = quantized_linear(outputs, inputs, bias, self._dtype, self.device, self._quant)
        if layer is None:
            layer = Linear(self._empty(outputs, inputs), bias)
        self._made.append(layer)
        return layer

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self.device)


def storage_of(tensor: Tensor) -> int:
    """Return where a tensor's memory lies; its views share that."""
    return tensor.untyped_storage().data_ptr()


def _fill_columns(target: Tensor, order: Tensor | None, tensor: Tensor) -> None:
    target.copy_(tensor if order is None else tensor[:, order])


def _fill_rows(layer: AnyLinear, begin: int, order: Tensor | None, tensor: Tensor) -> None:
    layer.fill(begin, tensor if order is None else tensor[order])


def _fill(target: Tensor, order: Tensor | None, tensor: Tensor) -> None:
    target.copy_(tensor if order is None else tensor[order])
