"""The span engine: gathers what waits from all sessions into one ragged batch and computes it.

One task (``SpanEngine.serve``) owns the queue and the device's worker thread. A turn takes what the
scheduler allots, runs it block by block with all tokens at once, and hands each piece of work its
rows. Frames of one session come one at a time (its reader waits for the result), so work in the
queue is always of different sessions and order within a session is kept.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import trio

from petalnode.compute import Compute, Load
from petalnode.errors import LocalProtocolError
from petalnode.models.span import RowSlice, Span
from petalnode.serving.scheduler import Share, is_decode, plan_turn

if TYPE_CHECKING:
    from petalnode.models.kv_cache import RowCache

log = logging.getLogger(__name__)

DECODING_S = 0.5
"""A session that decoded so long ago is expected back with its next token."""


@dataclass(frozen=True)
class RowWork:
    """``n`` tokens that go into ``cache`` at ``position``."""

    cache: RowCache
    position: int
    n: int


@dataclass(eq=False)
class Work:
    """One frame: ``hidden`` [T, H] for ``rows`` in order, through blocks ``[start, end)``."""

    start: int
    end: int
    rows: Sequence[RowWork]
    hidden: torch.Tensor
    taken: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)
    error: BaseException | None = None
    finished: trio.Event = field(default_factory=trio.Event)

    @property
    def left(self) -> int:
        return self.hidden.shape[0] - self.taken

    @property
    def longest(self) -> int:
        return max(row.n for row in self.rows)

    def slices(self, tokens: int) -> list[RowSlice]:
        """The next ``tokens`` tokens as slices of rows; a row's first slice truncates its cache."""
        slices = []
        low, high, offset = self.taken, self.taken + tokens, 0
        for row in self.rows:
            first, last = max(low, offset), min(high, offset + row.n)
            if first < last:
                position = row.position + first - offset
                row.cache.truncate(position)
                slices.append(RowSlice(row.cache, position, last - first))
            offset += row.n
        return slices


@dataclass(frozen=True)
class Piece:
    """What one piece of work gets in this turn."""

    work: Work
    slices: Sequence[RowSlice]
    hidden: torch.Tensor


class SpanEngine:
    """Computes frames on one span. ``run`` may be called by any number of tasks."""

    def __init__(self, span: Span, compute: Compute) -> None:
        self.span = span
        self._compute = compute
        self._queue: deque[Work] = deque()
        self._arrived = trio.Event()
        self._decoded_at = -DECODING_S
        self._prefill_is_due = False
        self.tokens = 0
        """Computed so far."""

    @property
    def queue_depth(self) -> int:
        """Pieces of work waiting or being computed."""
        return len(self._queue)

    async def run(
        self, start: int, end: int, rows: Sequence[RowWork], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [T, H] of blocks ``[start, end)`` for ``hidden`` [T, H], on the CPU.

        Each row's cache is truncated to its position first and extended after. A caller that is
        cancelled leaves the queue. Raises ``LocalProtocolError`` if the computation itself failed.
        """
        work = Work(start, end, rows, hidden)
        self._queue.append(work)
        self._arrived.set()
        try:
            await work.finished.wait()
        except trio.Cancelled:
            if work in self._queue:
                self._queue.remove(work)
            raise
        if work.error is not None:
            raise LocalProtocolError(
                f"The computation of blocks {start} to {end - 1} failed: {work.error}.",
                "The node goes on; see its log.",
            ) from work.error
        return work.outputs[0] if len(work.outputs) == 1 else torch.cat(work.outputs)

    async def serve(self) -> None:
        """Compute what comes, for ever. Runs in the node's nursery."""
        while True:
            if not self._queue:
                self._arrived = trio.Event()
                await self._arrived.wait()
            await self._turn()

    async def _turn(self) -> None:
        queue = list(self._queue)
        now = trio.current_time()
        if any(map(is_decode, queue)):
            self._decoded_at = now
        shares = plan_turn(
            queue,
            decoding=now - self._decoded_at < DECODING_S,
            prefill_is_due=self._prefill_is_due,
        )
        self._prefill_is_due = len(shares) < len(queue)
        pieces = [take(queue[share.index], share) for share in shares]
        try:
            outputs = await self._compute.run(
                lambda: compute_turn(self.span, pieces), load_of(pieces)
            )
        except Exception as error:  # supervision point: bad luck of one turn, not of the node
            log.exception("a turn of %d pieces failed", len(pieces))
            self._fail(pieces, error)
            return
        for piece, output in zip(pieces, outputs, strict=True):
            self.tokens += len(output)
            piece.work.outputs.append(output)
            if piece.work.left == 0:
                self._finish(piece.work)

    def _fail(self, pieces: Sequence[Piece], error: Exception) -> None:
        for piece in pieces:
            piece.work.error = error
            self._finish(piece.work)

    def _finish(self, work: Work) -> None:
        if work in self._queue:
            self._queue.remove(work)
        work.finished.set()


def take(work: Work, share: Share) -> Piece:
    """Cut the share off the work."""
    hidden = work.hidden[work.taken : work.taken + share.tokens]
    piece = Piece(work, work.slices(share.tokens), hidden)
    work.taken += share.tokens
    return piece


def load_of(pieces: Sequence[Piece]) -> Load:
    """How much work a turn is."""
    works = [piece.work for piece in pieces]
    return Load(
        blocks=max(work.end for work in works) - min(work.start for work in works),
        block_tokens=sum(len(p.hidden) * (p.work.end - p.work.start) for p in pieces),
    )


def compute_turn(span: Span, pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """Outputs of each piece, on the CPU. Runs in the worker thread.

    Pieces may use different sub-spans: between two boundaries, all pieces that use those blocks are
    one ragged batch.
    """
    hidden = [piece.hidden.to(span.device, span.dtype) for piece in pieces]
    bounds = sorted({bound for piece in pieces for bound in (piece.work.start, piece.work.end)})
    for start, end in pairwise(bounds):
        active = [
            index
            for index, piece in enumerate(pieces)
            if piece.work.start <= start and end <= piece.work.end
        ]
        if active:
            slices = [row for index in active for row in pieces[index].slices]
            batch = torch.cat([hidden[index] for index in active])
            sizes = [hidden[index].shape[0] for index in active]
            outputs = torch.split(span.forward(batch, slices, start, end), sizes)
            for index, output in zip(active, outputs, strict=True):
                hidden[index] = output
    return [output.cpu() for output in hidden]
