"""Hidden states through some of the model's blocks: for those who bring their own."""

from __future__ import annotations

import torch

from petalnode.errors import UsageError
from petalnode.protocol import Segment
from petalnode.session.chain import Chain


class HiddenSession:
    """A chain over blocks ``[start, end)`` alone. Made by ``Node.open_hidden``; one user at a time.

    What was fed is remembered here, in ``dtype``, so that hops that are lost are replaced as in any
    other session. ``length``: how many positions the hops have, from 0 on.
    """

    def __init__(self, chain: Chain, dtype: torch.dtype, max_positions: int) -> None:
        self.length = 0
        self.chain = chain
        self._dtype = dtype
        self._max_positions = max_positions

    async def forward(self, hidden: torch.Tensor, position: int | None = None) -> torch.Tensor:
        """Outputs [n, H], on the CPU, of block ``end - 1`` for ``hidden`` [n, H] of block
        ``start``.

        They go behind what is there, or at ``position``: what lay there and after is forgotten.
        Raises ``UsageError`` for what does not fit, and what the chain could not be mended from.
        """
        position = self.length if position is None else position
        self._check(hidden, position)
        self.length = min(self.length, position)  # if it is cut off, the rest is in doubt
        n = hidden.shape[0]
        fed = hidden.detach().to("cpu", self._dtype, copy=True)  # it may change while we send
        outputs = await self.chain.forward([Segment(0, position, n, n)], fed)
        self.length = position + n
        return outputs

    def rollback(self, position: int) -> None:
        """Forget everything from ``position`` on. Raises ``UsageError`` beyond ``length``."""
        if not 0 <= position <= self.length:
            raise UsageError(
                f"There are {self.length} positions, not {position}.",
                f"Go back to one from 0 to {self.length}.",
            )
        self.length = position

    def _check(self, hidden: torch.Tensor, position: int) -> None:
        size = self.chain.setup.hidden_size
        shape = tuple(hidden.shape)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != size or not hidden.is_floating_point():
            raise UsageError(
                f"Hidden states of shape {shape} and {hidden.dtype} cannot be fed.",
                f"Give floating point numbers of shape (tokens, {size}).",
            )
        if not 0 <= position <= self.length:
            raise UsageError(
                f"Position {position} does not follow what is there.",
                f"Go on at one from 0 to {self.length}.",
            )
        if position + shape[0] > self._max_positions:
            raise UsageError(
                f"The tokens would end at {position + shape[0]}, but the model's context is "
                f"{self._max_positions}.",
                "Feed fewer, or go back.",
            )


def check_span(start: int, end: int, num_blocks: int) -> None:
    """Raise ``UsageError`` unless these are blocks of a model that has so many."""
    if not 0 <= start < end <= num_blocks:
        raise UsageError(
            f"{start}:{end} is not a range of the model's {num_blocks} blocks.",
            f"Choose one within 0:{num_blocks}.",
        )
