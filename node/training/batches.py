"""Cutting a batch into micro-batches, and adding up what comes of them. No I/O, no randomness.

How a batch is cut depends on its rows, and on whether one hop alone computes all of it; sums are
made in the order of the cut. So a batch gives the same numbers whoever is done first, or dies on
the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from petalnode.training.protocol import MAX_ROWS

MIN_TOKENS = 128
"""Fewer make matrix products slow."""


@dataclass(frozen=True)
class Cut:
    """``pieces`` of a batch that has the tokens, none with more tokens than ``most``."""

    pieces: int
    most: int


PIPELINE = Cut(4, 256)
"""So many keep a chain of a few hops, or several replicas, busy; one step of it does not last."""
ONE_HOP = Cut(2, 384)
"""Nothing runs side by side: larger products, which read the weights more rarely. Still larger ones
would gain a few percent more, and make whoever generates wait longer for a step."""


@dataclass(frozen=True)
class Micro:
    """Whole rows of these ``lengths``, whose tokens are [first, first + tokens) of the batch."""

    first: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        """Its part [T, H] of a tensor of the whole batch."""
        return batch[self.first : self.first + self.tokens]


def cut(lengths: Sequence[int], how: Cut = PIPELINE) -> list[Micro]:
    """Micro-batches of consecutive rows, about equal, in order; a longer row is one by itself."""
    size = min(max(sum(lengths) // how.pieces, MIN_TOKENS), how.most)
    micros: list[Micro] = []
    rows: list[int] = []
    first = 0
    for n in lengths:
        if rows and (sum(rows) + n > size or len(rows) == MAX_ROWS):
            micros.append(Micro(first, tuple(rows)))
            first += sum(rows)
            rows = []
        rows.append(n)
    return [*micros, Micro(first, tuple(rows))]


class OrderedSum:
    """Sums of named tensors over micro-batches, added in the order of their numbers."""

    def __init__(self) -> None:
        self.total: dict[str, torch.Tensor] = {}
        self._next = 0
        self._waiting: dict[int, Mapping[str, torch.Tensor]] = {}

    def add(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add those of one micro-batch as soon as its turn comes. Numbers go from 0 on."""
        self._waiting[number] = tensors
        while self._next in self._waiting:
            for name, tensor in self._waiting.pop(self._next).items():
                known = self.total.get(name)
                self.total[name] = tensor.clone() if known is None else known.add_(tensor)
            self._next += 1
