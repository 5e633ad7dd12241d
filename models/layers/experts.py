"""The products of a mixture's experts, and how files that stack them are read.

Suffixes name shapes: E experts, O outputs, I inputs, S rows sorted by expert, G groups of numbers
that share a scale, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Expert(Protocol):
    """A linear layer [out, in] as `StackedFill` sees it."""

    def fill(self, begin: int, rows: Tensor) -> None:
        """Keep rows [n, in] as the rows from `begin` on."""


class GroupedLinear:
    """Linear layers of the same sizes; each row goes through one of them."""

    def __init__(self, experts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._experts = experts

    def __call__(self, x_SI: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        """Return [S, O] of rows sorted by expert; `groups` has (expert, rows), in this order."""
        out: list[Tensor] = []
        begin = 0
        for expert, rows in groups:
            out.append(self._experts[expert](x_SI[begin : begin + rows]))
            begin += rows
        return out[0] if len(out) == 1 else torch.cat(out)


class StackedFill:
    """Fills experts from one tensor [E, in, out]; row i is output `order[i]`."""

    def __init__(self, experts: Sequence[Expert], order: Tensor | None) -> None:
        self._experts, self._order = experts, order

    def weights(self, tensor_EIO: Tensor) -> None:
        """Take the experts."""
        self._fill(tensor_IO.mT for tensor_IO in tensor_EIO)

    def _fill(self, matrices_OI: Iterator[Tensor]) -> None:
        for expert, matrix_OI in zip(self._experts, matrices_OI, strict=True):
            if self._order is not None:
                matrix_OI = matrix_OI.index_select(0, self._order)
            expert.fill(0, matrix_OI.contiguous())


_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (*_POSITIVE, *(-one for one in _POSITIVE))
_PAIRS = torch.tensor([(low, high) for high in _FP4 for low in _FP4]).view(torch.int64).flatten()
"""The two numbers in each byte, that of the low half first; looked up as one, which is faster."""
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)


def expand_mxfp4(blocks_OGB: Tensor, scales_OG: Tensor) -> Tensor:
    """Return the numbers [O, I], float32, of 4-bit floats; each group shares a power of two.

    Format: OCP Microscaling 1.0, E2M1 with E8M0 scales.
    """
    pairs = _PAIRS.index_select(0, blocks_OGB.flatten().int())
    powers = _POWERS.index_select(0, scales_OG.flatten().int())
    values = pairs.view(torch.float32).view(len(powers), -1)
    return values.mul_(powers.unsqueeze(-1)).view(len(blocks_OGB), -1)


class Mxfp4Fill(StackedFill):
    """Fills experts from blocks and scales, expert by expert, once both are there.

    A copy is kept of what comes first; scales should, being small.
    """

    _blocks: Tensor | None = None
    _scales: Tensor | None = None

    def blocks(self, tensor_EOGB: Tensor) -> None:
        """Take the numbers, two a byte."""
        if self._scales is None:
            self._blocks = tensor_EOGB.clone()
        else:
            self._expand(tensor_EOGB, self._scales)

    def scales(self, tensor_EOG: Tensor) -> None:
        """Take the groups' exponents, which are biased by 127."""
        if self._blocks is None:
            self._scales = tensor_EOG.clone()
        else:
            self._expand(self._blocks, tensor_EOG)

    def _expand(self, blocks_EOGB: Tensor, scales_EOG: Tensor) -> None:
        self._fill(map(expand_mxfp4, blocks_EOGB, scales_EOG))
        self._blocks = self._scales = None
