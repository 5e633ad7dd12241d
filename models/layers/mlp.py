"""Dense feed-forwards: [T, H] to [T, H]. No torch: the products are the parts'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from petalnode.models.layers.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def times(activated: Tensor, up: Tensor) -> Tensor:
    """Return the product: in the memory of the first, unless a gradient may need that later."""
    return activated * up if activated.requires_grad else activated.mul_(up)


class GatedMlp:
    """down(activation(gate(x)) * up(x)), gate and up as one product (arXiv 2002.05202)."""

    def __init__(
        self,
        parts: Parts,
        hidden: int,
        wide: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        gate_up: str | Sequence[str] = GATE_UP,
        down: str = "mlp.down_proj",
    ) -> None:
        outputs = 2 * wide if isinstance(gate_up, str) else (wide, wide)
        self._gate_up = parts.linear(gate_up, outputs, hidden, bias=bias)
        self._down = parts.linear(down, hidden, wide, bias=bias)
        self._activation = parts.activation(activation)

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Return the output for each token on its own."""
        gate_TF, up_TF = self._gate_up(x_TH).chunk(2, -1)
        return self._down(times(self._activation(gate_TF), up_TF))


class Mlp:
    """down(activation(up(x)))."""

    def __init__(
        self,
        parts: Parts,
        hidden: int,
        wide: int,
        *,
        activation: str,
        bias: bool = True,
        up: str = "mlp.dense_h_to_4h",
        down: str = "mlp.dense_4h_to_h",
    ) -> None:
        self._up = parts.linear(up, wide, hidden, bias=bias)
        self._down = parts.linear(down, hidden, wide, bias=bias)
        self._activation = parts.activation(activation)

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Return the output for each token on its own."""
        return self._down(self._activation(self._up(x_TH)))
