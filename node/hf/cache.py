"""A ``Cache`` of transformers whose keys and values lie on the hops of a chain.

Columns are transformers' own: padding counts among them. Rows are the chain's: they hold tokens
alone, behind the prompt's P if there is one. What ``generate`` does to a cache, the hops are told
with the next step: beams are an ``order`` of rows, cropping is a lower position. Rows that begin
alike, the beams of one prompt, are computed once. B rows, n new columns, H hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor
from transformers import Cache

from petalnode.blocking import Held
from petalnode.errors import UsageError
from petalnode.protocol import Segment
from petalnode.session.hidden import HiddenSession

OpenRows = Callable[[Sequence[int]], Held[HiddenSession]]
"""Opens a session through all blocks, of rows that begin with so many tokens each."""


class RemoteCache(Cache):
    """The caches of one batch on the hops, freed by ``close`` or when nobody refers to it.

    The session is opened by the first step, for as many rows as that has. ``dtype`` is what hidden
    states are sent in; ``prompt`` [P, H] goes before each row's first token.
    """

    def __init__(
        self,
        open_rows: OpenRows,
        dtype: torch.dtype,
        prompt: Tensor | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.prompt = prompt
        self._open_rows, self._dtype = open_rows, dtype
        self._session: Held[HiddenSession] | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._lengths: list[int] = []
        self._order: list[int] = []
        self._in_step = False

    def __repr__(self) -> str:
        return f"RemoteCache({len(self._lengths)} rows, {self.get_seq_length()} columns)"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UsageError(
            "A cache on other machines cannot be copied or pickled.",
            "Feed the common beginning once more.",
        )

    @property
    def mask(self) -> Tensor | None:
        """Which columns [B, columns] hold tokens, not padding; None before the first step."""
        return self._mask if self._lengths else None

    @property
    def batch_size(self) -> int:
        """See ``Cache``: -1 before the first step."""
        return len(self._lengths) or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See ``Cache``."""
        return self._mask.shape[1]

    def close(self) -> None:
        """Free the caches on every hop."""
        if self._session is not None:
            self._session.leave()

    def step(self, hidden: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Outputs [B, keep, H] of the last block in the last ``keep`` columns, zeros for padding.

        ``hidden`` [B, n, H], which ask for no gradients, are new columns, tokens where ``mask``
        [B, n] says so. Raises what the session does; then the cache is of no more use.
        """
        if self._in_step:
            raise UsageError("A step of this cache was interrupted.", "Begin with a new one.")
        session = self._opened(mask)
        first = _first_alike(hidden, mask) if not any(self._lengths) else list(range(len(hidden)))
        fed = self._tokens(hidden, mask, first)
        wanted = mask[:, -keep:].clone()
        output = hidden.new_zeros(len(hidden), keep, hidden.shape[2])
        if fed:
            segments = [
                Segment(row, self._lengths[row], len(tokens), int(wanted[row].sum()))
                for row, tokens in fed.items()
            ]
            packed = torch.cat(list(fed.values())).to("cpu", self._dtype)
            self._in_step = True
            results = session.run(session.value.chain.forward, segments, packed, self._wire_order())
            self._in_step = False
            wanted[[row for row in range(len(hidden)) if row not in fed]] = False
            output[wanted.to(output.device)] = results.to(output)
            self._fed(fed, first)
        self._mask = torch.cat([self._mask, mask], 1)
        return output[first]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` was."""
        if self._lengths:
            self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some of the rows."""
        self.reorder_cache(torch.arange(len(self._lengths))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each row so many times. Raises ``UsageError`` for more than it began with."""
        rows = [row for row in range(len(self._lengths)) for _ in range(repeats)]
        if len(rows) > len(self._order):
            raise UsageError(
                f"{len(rows)} rows are needed, but the cache was begun with {len(self._order)}.",
                "Begin it with a batch of as many rows.",
            )
        self._select(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as many as the negative number says."""
        columns = self.get_seq_length()
        if tokens_to_remove > 0:  # the older meaning: how many stay
            tokens_to_remove -= columns
        stay = max(columns + tokens_to_remove, 0)
        gone = self._mask[:, stay:].sum(1).tolist()
        self._lengths = [length - one for length, one in zip(self._lengths, gone, strict=True)]
        self._mask = self._mask[:, :stay]

    def reset(self) -> None:
        """Forget every column."""
        self.crop(-self.get_seq_length())  # the prompt may stay where it is

    def _opened(self, mask: Tensor) -> Held[HiddenSession]:
        if self._session is None:
            batch, before = len(mask), 0 if self.prompt is None else len(self.prompt)
            self._session = self._open_rows([before + row for row in mask.sum(1).tolist()])
            weakref.finalize(self, self._session.release)
            self._lengths, self._order = [0] * batch, list(range(batch))
            self._mask = torch.zeros(batch, 0, dtype=torch.bool)
        return self._session

    def _tokens(self, hidden: Tensor, mask: Tensor, first: Sequence[int]) -> dict[int, Tensor]:
        """What is fed to which rows."""
        fed: dict[int, Tensor] = {}
        for row in sorted(set(first)):
            tokens = hidden[row][mask[row].to(hidden.device)]
            if not len(tokens):
                continue
            if self.prompt is not None and not self._lengths[row]:
                tokens = torch.cat([self.prompt.to(tokens), tokens])
            fed[row] = tokens
        return fed

    def _wire_order(self) -> list[int]:
        """The rows' order as a step carries it: nothing where each stays what it is."""
        return [] if self._order == list(range(len(self._order))) else self._order

    def _fed(self, fed: dict[int, Tensor], first: Sequence[int]) -> None:
        for row, tokens in fed.items():
            self._lengths[row] += len(tokens)
        self._lengths = [self._lengths[row] for row in first]
        self._order = [*first, *range(len(first), len(self._order))]

    def _select(self, rows: Sequence[int]) -> None:
        self._order = [*(self._order[row] for row in rows), *range(len(rows), len(self._order))]
        self._lengths = [self._lengths[row] for row in rows]
        self._mask = self._mask[list(rows)]


def _first_alike(hidden: Tensor, mask: Tensor) -> list[int]:
    """For each row the first that is the same."""
    first: list[int] = []
    for row in range(len(hidden)):
        alike = (
            other
            for other in sorted(set(first))
            if torch.equal(mask[row], mask[other]) and torch.equal(hidden[row], hidden[other])
        )
        first.append(next(alike, row))
    return first
