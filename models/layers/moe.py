"""A mixture of experts as a feed-forward: [T, H] to [T, H]. No torch: the products are the parts'.

A router gives each token K of E experts and what each weighs. The T * K pairs are sorted by expert,
so that each expert that is hit does one product with all its tokens, and the others none: nothing
runs over all experts (arXiv 2211.15841 calls it dropless). Suffixes name shapes: T tokens, H hidden
size, E experts, K experts a token, S pairs sorted by expert, F an expert's inner size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from petalnode.models.layers.mlp import times
from petalnode.models.layers.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.parts import Grouped, Layer

    Route = Callable[[Tensor], tuple[Tensor, Tensor]]
    """From x [T, H] to the experts' weights [T, K] and indices [T, K]."""
    Gate = Callable[[Tensor, Tensor], Tensor]
    """From the products gate [S, F] and up [S, F] to what goes down [S, F]."""


class SoftmaxRouter:
    """Weights are probabilities among all experts; `renormalise`: those chosen sum to one.

    Softmax in float32. The weights stay so, or take the activations' dtype where `rounded`.
    """

    def __init__(self, logits: Layer, chosen: int, *, renormalise: bool, rounded: bool) -> None:
        self._logits, self._chosen = logits, chosen
        self._renormalise, self._rounded = renormalise, rounded

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [T, K] and the experts' indices [T, K]."""
        weights_TK, chosen_TK = self._logits(x_TH).float().softmax(-1).topk(self._chosen, -1)
        if self._renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(x_TH.dtype) if self._rounded else weights_TK, chosen_TK


class TopRouter:
    """Weights are a softmax among the experts chosen, in the activations' dtype."""

    def __init__(self, logits: Layer, chosen: int) -> None:
        self._logits, self._chosen = logits, chosen

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [T, K] and the experts' indices [T, K]."""
        best_TK, chosen_TK = self._logits(x_TH).topk(self._chosen, -1)
        return best_TK.softmax(-1), chosen_TK


class MixtureOfExperts:
    """The sum over a token's experts of weight * down(gate(x), up(x)).

    `gate_up` gives gate and up side by side; `combine` makes one of the two.
    """

    def __init__(self, route: Route, gate_up: Grouped, combine: Gate, down: Grouped) -> None:
        self._route, self._gate_up, self._combine, self._down = route, gate_up, combine, down

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Return the output for each token on its own."""
        weights_TK, chosen_TK = self._route(x_TH)
        experts_S, order_S = chosen_TK.flatten().sort()
        groups = list(Counter(experts_S.tolist()).items())
        x_SH = x_TH[order_S // chosen_TK.shape[1]]
        gate_SF, up_SF = self._gate_up(x_SH, groups).chunk(2, -1)
        sorted_SH = self._down(self._combine(gate_SF, up_SF), groups)
        out_SH = sorted_SH.new_empty(sorted_SH.shape).index_copy_(0, order_S, sorted_SH)
        out_TKH = out_SH.view(*chosen_TK.shape, -1)
        return (out_TKH * weights_TK.unsqueeze(-1)).sum(1).to(x_TH.dtype)


def gated(parts: Parts, activation: str) -> Gate:
    """Return activation(gate) * up."""
    act = parts.activation(activation)
    return lambda gate_SF, up_SF: times(act(gate_SF), up_SF)


def clamped_swiglu(limit: float, alpha: float = 1.702) -> Gate:
    """Return gate * sigmoid(alpha * gate) * (up + 1), both clamped first: gpt-oss's activation."""

    def combine(gate_SF: Tensor, up_SF: Tensor) -> Tensor:
        gate_SF = gate_SF.clamp(max=limit)
        return (up_SF.clamp(-limit, limit) + 1) * (gate_SF * (gate_SF * alpha).sigmoid())

    return combine
