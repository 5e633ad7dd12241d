"""A span: the consecutive blocks that a node holds, run over ragged batches.

A span keeps no state of any session. Positions come from the caller, caches belong to the sessions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petalnode.errors import LocalProtocolError
from petalnode.models.config import ModelConfig
from petalnode.models.families.family import Block
from petalnode.models.kv_cache import RowCache
from petalnode.models.layers.adapted import Additions
from petalnode.models.layers.ragged import RaggedBatch, RowSlice
from petalnode.models.layers.weights import storage_of
from petalnode.models.tuning.rows import TunedRows

__all__ = ["LoadedBlock", "RowSlice", "Span"]


@dataclass(frozen=True)
class LoadedBlock:
    """A block with its weights, which take `nbytes` and lie at `storages`, and what the running
    batch adds to it."""

    block: Block
    nbytes: int
    additions: Additions = field(default_factory=Additions)
    storages: frozenset[int] = frozenset()


class Span:
    """The blocks [start, end) of a model, in one dtype on one device. For one thread at a time."""

    def __init__(
        self,
        config: ModelConfig,
        start: int,
        blocks: Sequence[LoadedBlock],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.start, self.end = config, start, start + len(blocks)
        self.dtype, self.device = dtype, device
        self._blocks = tuple(blocks)
        self._storages = frozenset[int]().union(*(one.storages for one in blocks))

    @property
    def param_bytes(self) -> int:
        """Bytes of all weights of the span."""
        return sum(one.nbytes for one in self._blocks)

    def has_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight of the span, or a view of one."""
        return storage_of(tensor) in self._storages

    def loaded(self, index: int) -> LoadedBlock | None:
        """Return block `index` of the model, or None where this span does not hold it."""
        return self._blocks[index - self.start] if self.start <= index < self.end else None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in one block."""
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize

    def new_row(self, start: int, end: int) -> RowCache:
        """Return an empty cache for one row that passes the blocks [start, end) of this span."""
        self.check_range(start, end)
        heads, size = self.config.num_kv_heads, self.config.head_dim
        return RowCache(start, end, heads, size, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, x: Tensor, rows: Sequence[RowSlice], start: int, end: int) -> Tensor:
        """Run hidden states x [T, H] through the blocks [start, end); return [T, H].

        `rows` cut the T tokens, in order. Each row's `position` must be its cache's length, and its
        cache must be for these blocks at least; no row may appear twice. A row of more blocks comes
        in several calls, in order: its length advances with its last block, so that rows of
        different sub-spans can share the blocks that they share. Raises `LocalProtocolError` where
        the caller breaks these rules.
        """
        self.check_range(start, end)
        self._check_rows(x, rows, start, end)
        batch = RaggedBatch(rows, self.dtype, self.device)
        x = x.to(dtype=self.dtype, device=self.device)
        if any(row.tuning is not None for row in rows):
            x = self._tuned(x, batch, TunedRows(rows), start, end)
        else:
            for one in self._blocks[start - self.start : end - self.start]:
                x = one.block.forward(x, batch)
        for row in rows:
            if row.cache.end == end:
                row.cache.advance(row.n)
        return x

    def _tuned(
        self, x: Tensor, batch: RaggedBatch, tuned: TunedRows, start: int, end: int
    ) -> Tensor:
        for index in range(start, end):
            x = self.run_block(index, x, batch, tuned)
        return x

    def run_block(self, index: int, x: Tensor, batch: RaggedBatch, tuned: TunedRows) -> Tensor:
        """Return the output [T, H] of block `index` with what the rows add; `x` is left alone."""
        one = self._blocks[index - self.start]
        x = tuned.prompted(index, x)
        one.additions.now = tuned.additions(index)
        try:
            return one.block.forward(x, batch)
        finally:
            one.additions.now = ()

    def check_range(self, start: int, end: int) -> None:
        """Raise `LocalProtocolError` for blocks that this span does not hold."""
        if not self.start <= start < end <= self.end:
            raise LocalProtocolError(
                f"Blocks {start}:{end} were asked of a span that holds {self.start}:{self.end}."
            )

    def _check_rows(self, x: Tensor, rows: Sequence[RowSlice], start: int, end: int) -> None:
        if x.shape != (sum(row.n for row in rows), self.config.hidden_size) or not rows:
            raise LocalProtocolError(f"A batch of shape {list(x.shape)} does not fit its rows.")
        if len({id(row.cache) for row in rows}) != len(rows):
            raise LocalProtocolError("One row appears twice in a batch.")
        for row in rows:
            if row.n < 1 or row.position != row.cache.length:
                raise LocalProtocolError(
                    f"{row.n} tokens at position {row.position} do not extend a row of "
                    f"{row.cache.length} tokens."
                )
            if not row.cache.start <= start < end <= row.cache.end:
                raise LocalProtocolError(
                    f"A row for {row.cache.start}:{row.cache.end} was sent through {start}:{end}."
                )
