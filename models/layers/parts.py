"""How a block says what it is made of, once, for everything that asks. No torch.

A block (or a client's part) asks a `Parts` for its layers and names the checkpoint's tensors that
fill them. `petalnode.models.layers.weights` makes real layers; `ShapeParts`, here, only writes down
names and shapes: that is the layout which files are checked against and memory is planned with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    Layer = Callable[[Tensor], Tensor]
    Grouped = Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]
    """From x [S, in], sorted by expert, and (expert, rows) for each that is hit, to [S, out]."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint. `in_linear`: a matrix that quantization may shrink.

    `stored`: safetensors' name of the one dtype that it must have, where not any float will do.
    `expands`: how many numbers each of its elements becomes when it is loaded. `inputs`: numbers
    in a row of the matrix, where that is not the last dimension.
    """

    shape: tuple[int, ...]
    in_linear: bool = False
    stored: str | None = None
    expands: int = 1
    inputs: int | None = None

    @property
    def numel(self) -> int:
        """Numbers that the loaded tensor has."""
        return math.prod(self.shape) * self.expands


Layout = dict[str, TensorSpec]


class Vocabulary(Protocol):
    """A matrix [V, H] with a row for each token id, kept in the checkpoint's own dtype."""

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the rows [T, H] of token ids [T], in the dtype of the activations."""

    def project(self, x: Tensor) -> Tensor:
        """Return the product [T, V] of x [T, H] with every row, in float32."""


class Parts(Protocol):
    """Makes layers, filled later by the checkpoint's tensors of the given names.

    Names are those of the checkpoint, without the block's prefix. A layer is a function from
    [..., in] to [..., out].
    """

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
        """Return x @ weight.T + bias. Several names make one fused layer, outputs side by side.

        `name.weight` is [out, in], `name.bias` [out]. Row i of the layer is row `row_order[i]` of
        the one tensor named. `dense` layers (routers, the head) are never quantized.
        """

    def experts(
        self, names: str | Sequence[str], experts: int, outputs: int | Sequence[int], inputs: int
    ) -> Grouped:
        """Return x @ weight[e].T for each row's expert e; several names make one fused layer.

        Expert e's tensors are `name.weight` [out, in] with e for the {} in the name.
        """

    def stacked_experts(
        self,
        name: str,
        experts: int,
        outputs: int,
        inputs: int,
        *,
        row_order: Sequence[int] | None = None,
        mxfp4: bool = False,
    ) -> Grouped:
        """Return x @ weight[e] + bias[e] for each row's expert e.

        `name` is [E, in, out], `name_bias` [E, out]; `row_order` as for `linear`. With `mxfp4` it
        is `name_blocks` [E, out, in / 32, 16] and `name_scales` [E, out, in / 32] instead.
        """

    def rms_norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> Layer:
        """Return x / rms(x) * `name.weight` over the last dimension; Gemma's weight lacks one."""

    def layer_norm(self, name: str, size: int, eps: float, *, affine: bool = True) -> Layer:
        """Return LayerNorm over the last dimension, if `affine` by `name.weight`, `name.bias`."""

    def vector(self, name: str, *shape: int) -> Tensor:
        """Return the tensor itself, in the dtype of the activations."""

    def vocabulary(self, name: str, size: int, hidden: int) -> Vocabulary:
        """Return a table [size, hidden] of embeddings, or a head. For the client."""

    def constant(self, values: Sequence[float]) -> Tensor:
        """Return float32 numbers that no checkpoint holds."""

    def activation(self, name: str) -> Layer:
        """Return one of `ACTIVATIONS`. It may overwrite what it is given, where that needs no
        gradient."""


MXFP4_GROUP = 32
"""Numbers that share a scale."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class ShapeParts:
    """Writes down what is asked for in `layout`; the layers that it returns cannot run."""

    def __init__(self) -> None:
        self.layout: Layout = {}

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
        for name, size in named_sizes(names, outputs):
            self.layout[f"{name}.weight"] = TensorSpec((size, inputs), not dense)
            if bias:
                self.layout[f"{name}.bias"] = TensorSpec((size,))
        return _not_here

    def experts(
        self, names: str | Sequence[str], experts: int, outputs: int | Sequence[int], inputs: int
    ) -> Grouped:
        """See `Parts.experts`."""
        many = [names] if isinstance(names, str) else names
        for expert in range(experts):
            self.linear([name.format(expert) for name in many], outputs, inputs)
        return _not_here

    def stacked_experts(
        self,
        name: str,
        experts: int,
        outputs: int,
        inputs: int,
        *,
        row_order: Sequence[int] | None = None,
        mxfp4: bool = False,
    ) -> Grouped:
        """See `Parts.stacked_experts`."""
        if mxfp4:
            groups = (experts, outputs, inputs // MXFP4_GROUP)
            self.layout[f"{name}_scales"] = TensorSpec(groups, stored="U8", expands=0)
            blocks = TensorSpec((*groups, MXFP4_GROUP // 2), True, "U8", 2, inputs)
            self.layout[f"{name}_blocks"] = blocks
        else:
            self.layout[name] = TensorSpec((experts, inputs, outputs), True, inputs=inputs)
        self.layout[f"{name}_bias"] = TensorSpec((experts, outputs))
        return _not_here

    def rms_norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> Layer:
        """See `Parts.rms_norm`."""
        self.layout[f"{name}.weight"] = TensorSpec((size,))
        return _not_here

    def layer_norm(self, name: str, size: int, eps: float, *, affine: bool = True) -> Layer:
        """See `Parts.layer_norm`."""
        for end in ("weight", "bias") if affine else ():
            self.layout[f"{name}.{end}"] = TensorSpec((size,))
        return _not_here

    def vector(self, name: str, *shape: int) -> Any:
        """See `Parts.vector`."""
        self.layout[name] = TensorSpec(shape)

    def vocabulary(self, name: str, size: int, hidden: int) -> Any:
        """See `Parts.vocabulary`."""
        self.layout[name] = TensorSpec((size, hidden))

    def constant(self, values: Sequence[float]) -> Any:
        """See `Parts.constant`."""

    def activation(self, name: str) -> Layer:
        """See `Parts.activation`."""
        return _not_here


def named_sizes(
    names: str | Sequence[str], outputs: int | Sequence[int]
) -> Iterator[tuple[str, int]]:
    """Yield each name of a (fused) layer with its number of outputs."""
    if isinstance(names, str):
        names = (names,)
    if isinstance(outputs, int):
        outputs = (outputs,)
    yield from zip(names, outputs, strict=True)


def _not_here(x: Tensor, *groups: object) -> Tensor:
    raise TypeError("these layers only describe shapes")
