"""What a sender remembers of what it sent, so that a receiver can be replaced.

Hidden states by row and position (design.md section 5). A log keeps a prefix of each row: where
its budget ends it stops growing, and whoever is one hop further up replays the rest.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from petalnode.protocol import MAX_STEP_TOKENS, Replay, Segment, Step
from petalnode.serving.budget import KvBudget

MIN_TOKENS = 64


@dataclass(frozen=True)
class Kept:
    """What a sender can give again: ``lengths`` of the rows, from 0 on. ``complete``: all that
    it ever sent is still there."""

    lengths: tuple[int, ...]
    complete: bool


class Source(Protocol):
    """Where a sender finds again what it sent.

    ``last_seq``: the last step that was recorded; ``ordered``: the last that rearranged rows.
    """

    last_seq: int
    ordered: int

    @property
    def complete(self) -> bool:
        """Whether nothing of what was sent is lacking."""

    def length(self, row: int) -> int:
        """Positions of a row that can be read, from 0 on."""

    async def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """The hidden states [end - start, H] that were sent for those positions."""

    def record(self, step: Step, hidden: torch.Tensor) -> None:
        """Remember a step [T, H] that is being sent."""


class ReplayLog:
    """A ``Source`` in memory. Its tokens count against ``budget``, shared by all logs of a node."""

    def __init__(self, rows: int, budget: KvBudget) -> None:
        self.last_seq = self.ordered = 0
        self._budget = budget
        self._held = 0
        self._buffers: list[torch.Tensor | None] = [None] * rows
        self._lengths = [0] * rows
        self._cut = [False] * rows  # more was sent than there is

    @property
    def complete(self) -> bool:
        """See ``Source``."""
        return not any(self._cut)

    def length(self, row: int) -> int:
        """See ``Source``."""
        return self._lengths[row]

    async def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """See ``Source``."""
        buffer = self._buffers[row]
        assert buffer is not None
        assert end <= self._lengths[row]
        return buffer[start:end]

    def record(self, step: Step, hidden: torch.Tensor) -> None:
        """See ``Source``. What does not fit the budget, or lies behind a gap, is not kept."""
        self.last_seq = max(self.last_seq, step.seq)
        if step.order and step.seq > self.ordered:
            self._reorder(step.order)
        elif step.as_of > self.ordered:
            self._cut = [length > 0 for length in self._lengths]
            self.drop()  # what there is belongs to an arrangement that is past
        self.ordered = max(self.ordered, step.as_of, step.seq if step.order else 0)
        offset = 0
        for segment in step.segments:
            self._extend(segment, hidden[offset : offset + segment.n])
            offset += segment.n

    def drop(self) -> None:
        """Forget everything and give the tokens back."""
        self._buffers = [None] * len(self._buffers)
        self._lengths = [0] * len(self._lengths)
        self._budget.resize(self._held, 0)
        self._held = 0

    def _extend(self, segment: Segment, hidden: torch.Tensor) -> None:
        row, end = segment.row, segment.position + segment.n
        self._cut[row] = True
        if segment.position > self._lengths[row]:
            return
        buffer = self._buffers[row]
        capacity = 0 if buffer is None else len(buffer)
        if end > capacity:
            buffer = self._grow(row, max(end, MIN_TOKENS, capacity * 3 // 2), hidden)
        if buffer is None or end > len(buffer):
            self._lengths[row] = segment.position
            return
        buffer[segment.position : end] = hidden
        self._lengths[row] = end
        self._cut[row] = False

    def _grow(self, row: int, capacity: int, like: torch.Tensor) -> torch.Tensor | None:
        old = self._buffers[row]
        wanted = self._held + capacity - (0 if old is None else len(old))
        if not self._budget.resize(self._held, wanted):
            return old
        self._held = wanted
        grown = like.new_empty((capacity, like.shape[1]))
        if old is not None:
            grown[: self._lengths[row]] = old[: self._lengths[row]]
        self._buffers[row] = grown
        return grown

    def _reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was: a copy where another row has that already."""
        buffers, lengths, cut = self._buffers, self._lengths, self._cut
        taken: set[int] = set()
        self.drop()
        for row, source in enumerate(order):
            buffer = buffers[source]
            if buffer is not None and source in taken:
                self._extend(Segment(row, 0, lengths[source], 0), buffer[: lengths[source]])
            elif buffer is not None and self._budget.resize(self._held, self._held + len(buffer)):
                self._held += len(buffer)
                self._buffers[row], self._lengths[row] = buffer, lengths[source]
                taken.add(source)
            self._cut[row] = cut[source] or self._lengths[row] < lengths[source]


async def replayed(
    source: Source, replay: Replay, *, chunk: int = MAX_STEP_TOKENS
) -> AsyncGenerator[tuple[Step, torch.Tensor], None]:
    """The steps that bring a receiver up to date, as far as the source reaches.

    First what is committed, row by row in chunks that nobody awaits; then the pending steps, up to
    the first that the source does not hold. The source may change between two of them.
    """
    for row, (start, committed) in enumerate(zip(replay.start, replay.committed, strict=True)):
        for position in range(start, committed, chunk):
            n = min(chunk, min(committed, source.length(row)) - position)
            if n <= 0:
                break
            yield (
                Step(0, (Segment(row, position, n, 0),), as_of=source.ordered),
                await source.read(row, position, position + n),
            )
    for step in replay.pending:
        held = all(source.length(s.row) >= s.position + s.n for s in step.segments)
        if step.seq > source.last_seq or not held:
            return
        parts = [await source.read(s.row, s.position, s.position + s.n) for s in step.segments]
        yield step, parts[0] if len(parts) == 1 else torch.cat(parts)
