"""The attention cache of one row, owned by the session that created it.

A cache belongs to no model and no block: whoever drops it frees it. Its memory follows the tokens
it holds (it grows by half, block by block), never the longest context that the model allows.
"""

import torch
from torch import Tensor

MIN_TOKENS = 64
"""Smallest allocation of a block, tokens: the first 64 tokens cost one allocation."""


class RowCache:
    """Keys and values of one row for the blocks [start, end).

    `length` tokens are valid in every block. A forward pass writes behind `length` and advances it
    when all blocks are done, so a pass that fails half-way leaves the cache as it was.
    """

    def __init__(
        self,
        start: int,
        end: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.start, self.end = start, end
        self.length = 0
        empty = torch.empty((2, num_kv_heads, 0, head_dim), dtype=dtype, device=device)
        # By block: memory [2, kv_heads, capacity, head_dim], then its keys and its values. The two
        # views are kept because making one costs as much as a small kernel.
        self._blocks = [(empty, empty[0], empty[1])] * (end - start)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held now, capacity that is not used yet included."""
        return sum(memory.nbytes for memory, _, _ in self._blocks)

    def capacity_after(self, length: int) -> int:
        """Tokens of memory in a block once the row has held `length` tokens."""
        capacity = self._blocks[0][1].shape[1]
        return capacity if length <= capacity else max(length, MIN_TOKENS, capacity * 3 // 2)

    def copy(self) -> "RowCache":
        """Return another row with the same tokens and as much memory."""
        _, heads, _, size = self._blocks[0][0].shape
        like = self._blocks[0][0]
        other = RowCache(self.start, self.end, heads, size, like.dtype, like.device)
        other.length = self.length
        for block, (memory, _, _) in enumerate(self._blocks):
            kept = torch.empty_like(memory)
            kept[:, :, : self.length].copy_(memory[:, :, : self.length])
            other._blocks[block] = (kept, kept[0], kept[1])
        return other

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on. Costs nothing, keeps the memory."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a row of {self.length} tokens to {length}")
        self.length = length

    def extend(self, block: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values `new` [2, kv_heads, n, head_dim] behind `length`.

        Returns all keys and all values, each [kv_heads, length + n, head_dim], as views of this
        row's memory. `length` does not change: see `advance`.
        """
        n = new.shape[2]
        used = self.length + n
        memory, keys, values = self._blocks[block - self.start]
        if keys.shape[1] < used:
            memory, keys, values = self._grow(block, used)
        memory.narrow(2, self.length, n).copy_(new)
        return keys.narrow(1, 0, used), values.narrow(1, 0, used)

    def advance(self, n: int) -> None:
        """Declare n more tokens valid: all blocks have extended by them."""
        self.length += n

    def _grow(self, block: int, used: int) -> tuple[Tensor, Tensor, Tensor]:
        old, _, _ = self._blocks[block - self.start]
        two, kv_heads, capacity, head_dim = old.shape
        capacity = max(used, MIN_TOKENS, capacity * 3 // 2)
        memory = old.new_empty((two, kv_heads, capacity, head_dim))
        memory[:, :, : self.length].copy_(old[:, :, : self.length])
        self._blocks[block - self.start] = grown = (memory, memory[0], memory[1])
        return grown
