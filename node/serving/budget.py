"""How many tokens of attention cache a node still has room for."""

from __future__ import annotations


class KvBudget:
    """Counts cache in *block tokens* (one token in one block); nothing is reserved ahead of use."""

    def __init__(self, tokens: int, blocks: int) -> None:
        """Room for ``tokens`` tokens in each of the span's ``blocks`` blocks."""
        self._blocks = max(blocks, 1)
        self._capacity = tokens * self._blocks
        self._used = 0

    @property
    def tokens_free(self) -> int:
        """Tokens over the whole span that still fit."""
        return max(0, self._capacity - self._used) // self._blocks

    @property
    def used(self) -> int:
        """Block tokens that are held now."""
        return self._used

    def resize(self, held: int, wanted: int) -> bool:
        """Change a row set's holding from ``held`` to ``wanted`` block tokens, if it fits."""
        if wanted > held and self._used + wanted - held > self._capacity:
            return False
        self._used += wanted - held
        return True
