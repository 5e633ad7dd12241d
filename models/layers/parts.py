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


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint. `in_linear`: a matrix that quantization may shrink."""

    shape: tuple[int, ...]
    in_linear: bool = False

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


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

    def rms_norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> Layer:
        """Return x / rms(x) * `name.weight` over the last dimension; Gemma's weight lacks one."""

    def layer_norm(self, name: str, size: int, eps: float, *, bias: bool = True) -> Layer:
        """Return LayerNorm over the last dimension by `name.weight` and `name.bias`."""

    def vector(self, name: str, *shape: int) -> Tensor:
        """Return the tensor itself, in the dtype of the activations."""

    def vocabulary(self, name: str, size: int, hidden: int) -> Vocabulary:
        """Return a table [size, hidden] of embeddings, or a head. For the client."""

    def constant(self, values: Sequence[float]) -> Tensor:
        """Return float32 numbers that no checkpoint holds."""

    def activation(self, name: str) -> Layer:
        """Return one of `ACTIVATIONS`."""


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

    def rms_norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> Layer:
        """See `Parts.rms_norm`."""
        self.layout[f"{name}.weight"] = TensorSpec((size,))
        return _not_here

    def layer_norm(self, name: str, size: int, eps: float, *, bias: bool = True) -> Layer:
        """See `Parts.layer_norm`."""
        self.layout[f"{name}.weight"] = TensorSpec((size,))
        if bias:
            self.layout[f"{name}.bias"] = TensorSpec((size,))
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


def _not_here(x: Tensor) -> Tensor:
    raise TypeError("these layers only describe shapes")
