"""Linear layers of frozen weights, and what the rows of the running batch add to them.

Low-rank matrices come with the rows, not with the weights: rows with different ones, and with none,
share a batch. The layers of one block share an `Additions`, which a span fills for the time of a
pass; while it is empty, asking it is all that an adapted layer costs.

Suffixes name shapes: T tokens of the batch, n those of one range, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from petalnode.models.tuning.tuning import LowRank


@dataclass(frozen=True, eq=False)
class Addition:
    """What the tokens [begin, end) of the batch add to a block's layers, by site."""

    begin: int
    end: int
    lora: Mapping[str, LowRank]


class Additions:
    """What the running batch adds to one block; empty between passes."""

    def __init__(self) -> None:
        self.now: Sequence[Addition] = ()


class AdaptedLinear:
    """A (fused) linear layer; `sites`: the name of each part and its number of outputs.

    `order`: row i of the layer is row `order[i]` of its one site, as the checkpoint has it.
    """

    def __init__(
        self,
        layer: Callable[[Tensor], Tensor],
        additions: Additions,
        sites: Sequence[tuple[str, int]],
        order: Tensor | None,
    ) -> None:
        self.layer = layer
        self._additions, self._order = additions, order
        self._sites: list[tuple[str, int, int]] = []
        at = 0
        for name, size in sites:
            self._sites.append((name, at, at + size))
            at += size

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return [T, O] of x [T, I], with what the batch adds."""
        y_TO = self.layer(x_TI)
        if self._additions.now:
            self._add(x_TI, y_TO)
        return y_TO

    def _add(self, x_TI: Tensor, y_TO: Tensor) -> None:
        for one in self._additions.now:
            tokens = slice(one.begin, one.end)
            for site, first, last in self._sites:
                pair = one.lora.get(site)
                if pair is not None:
                    y_TO[tokens, first:last].add_(self._product(x_TI[tokens], pair))

    def _product(self, x_nI: Tensor, pair: LowRank) -> Tensor:
        """Return the product [n, O] in the dtype of the matrices."""
        b_OR = pair.b if self._order is None else pair.b.index_select(0, self._order)
        return (x_nI.to(pair.a.dtype) @ pair.a.mT) @ b_OR.mT * pair.scale
