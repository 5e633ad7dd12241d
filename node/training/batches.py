"""Cutting a batch into micro-batches, and adding up what comes of them. No I/O, no randomness.

How a batch is cut depends on its rows alone, never on who computes them, and sums are made in the
order of the cut: the same batch gives the same numbers by whatever way it went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

MIN_TOKENS = 128
"""Fewer make matrix products slow."""
MAX_TOKENS = 256
"""More make others wait long for a step; a longer row is one micro-batch all the same."""
PIECES = 4
"""Micro-batches of a batch that has the tokens: so many keep a chain of a few hops busy."""


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


def cut(lengths: Sequence[int]) -> list[Micro]:
    """Micro-batches of consecutive rows, about equal, in order."""
    size = min(max(sum(lengths) // PIECES, MIN_TOKENS), MAX_TOKENS)
    micros: list[Micro] = []
    rows: list[int] = []
    first = 0
    for n in lengths:
        if rows and sum(rows) + n > size:
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
