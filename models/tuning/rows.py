"""The tunings of the rows of one batch, cut into ranges of tokens, for one block after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from petalnode.models.layers.adapted import Addition
from petalnode.models.tuning.tuning import Tuning


class TunedRow(Protocol):
    """The next `n` tokens of a row, from `position` on, and what is added to the blocks for it."""

    @property
    def position(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def tuning(self) -> Tuning | None: ...


class TunedRows:
    """What the rows of a batch, in their order, add to each block."""

    def __init__(self, rows: Sequence[TunedRow]) -> None:
        # Neighbours with the same tuning are one range: (first token, behind the last, tuning).
        self._ranges: list[tuple[int, int, Tuning]] = []
        # (first token, its position, tokens, tuning)
        self._rows: list[tuple[int, int, int, Tuning]] = []
        begin = 0
        for row in rows:
            end = begin + row.n
            if row.tuning is not None:
                self._rows.append((begin, row.position, row.n, row.tuning))
                self._extend(begin, end, row.tuning)
            begin = end

    def _extend(self, begin: int, end: int, tuning: Tuning) -> None:
        if self._ranges and self._ranges[-1][1] == begin and self._ranges[-1][2] is tuning:
            begin = self._ranges.pop()[0]
        self._ranges.append((begin, end, tuning))

    def additions(self, index: int) -> Sequence[Addition]:
        """Return what is added to the linear layers of block `index`."""
        found = ((begin, end, tuning.blocks.get(index)) for begin, end, tuning in self._ranges)
        return [
            Addition(begin, end, block.lora) for begin, end, block in found if block and block.lora
        ]

    def prompted(self, index: int, x_TH: Tensor) -> Tensor:
        """Return the input of block `index` with its prompts: another tensor, if there are any."""
        own = False
        for begin, position, n, tuning in self._rows:
            block = tuning.blocks.get(index)
            if block is None or block.prompt is None:
                continue
            prompt_PH = block.prompt[position : position + n]
            if len(prompt_PH):
                x_TH = x_TH if own else x_TH.clone()
                own = True
                x_TH[begin : begin + len(prompt_PH)].add_(prompt_PH)
        return x_TH
