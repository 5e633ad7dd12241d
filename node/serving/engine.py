"""The span engine: gathers what waits from all sessions into one ragged batch and computes it.

One task (``SpanEngine.serve``) owns the queue and the device's worker thread. A turn takes what the
scheduler allots, runs it block by block with all tokens at once, and hands each piece of work its
rows. Frames of one session come one at a time (its reader waits for the result), so work in the
queue is always of different sessions and order within a session is kept.

Training comes last: a turn without anything else is one step of the first training job, a block
long, and so is every turn that the scheduler says is due (``training_is_due``). In memory are that
job's activations and, within a bound, those that ``Spare`` work computes ahead: that has its turn
where nothing at all waits, and nobody decoded for a while.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
import trio

from petalnode.compute import Compute, Load
from petalnode.errors import LocalProtocolError
from petalnode.models.span import RowSlice, Span
from petalnode.serving.scheduler import Share, is_decode, plan_turn, training_is_due

if TYPE_CHECKING:
    from petalnode.models.kv_cache import RowCache
    from petalnode.models.tuning.tuning import Tuning

log = logging.getLogger(__name__)

DECODING_S = 0.5
"""A session that decoded so long ago is expected back with its next token."""
SPARE_AFTER_S = 5.0
"""After the last decode: the next token of a slow chain shall not wait for spare work."""


@dataclass(frozen=True)
class RowWork:
    """``n`` tokens that go into ``cache`` at ``position``; ``tuning`` is added to the blocks."""

    cache: RowCache
    position: int
    n: int
    tuning: Tuning | None = None


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
                slices.append(RowSlice(row.cache, position, last - first, row.tuning))
            offset += row.n
        return slices


@dataclass(frozen=True)
class Piece:
    """What one piece of work gets in this turn."""

    work: Work
    slices: Sequence[RowSlice]
    hidden: torch.Tensor


class Steps(Protocol):
    """A training job: so many calls of ``step``, each a block's work, and it is done."""

    @property
    def steps_left(self) -> int:
        """How many calls are left."""

    def step(self) -> None:
        """Compute the next one."""


Begin = Callable[[Span], Steps]
"""Makes a job of a span, in the worker thread."""


@dataclass(eq=False)
class Training:
    """A training job on its way; ``load`` is that of a step."""

    begin: Begin
    load: Load
    steps: Steps | None = None
    error: Exception | None = None
    finished: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True)
class Turn:
    """What is computed next, and what becomes of its result, or of its error."""

    what: str
    compute: Callable[[], Any]
    load: Load
    done: Callable[[Any], None]
    failed: Callable[[Exception], None]


class Spare(Protocol):
    """Work for when there is no other."""

    def spare_turn(self) -> Turn | None:
        """Some, if there is any."""


class SpanEngine:
    """Computes frames on one span. ``run`` and ``train`` may be called by any number of tasks."""

    def __init__(self, span: Span, compute: Compute, spare: Spare | None = None) -> None:
        self.span = span
        self._compute, self._spare = compute, spare
        self._queue: deque[Work] = deque()
        self._jobs: deque[Training] = deque()
        self._turns_without_training = 0
        self._arrived = trio.Event()
        self._decoded_at = -math.inf
        self._prefill_is_due = False
        self.tokens = 0
        """Computed so far."""
        self.training_steps = 0
        """Computed so far."""

    @property
    def queue_depth(self) -> int:
        """Pieces of work waiting or being computed."""
        return len(self._queue) + len(self._jobs)

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

    async def train(self, begin: Begin, load: Load) -> Steps:
        """Compute a training job to its end and return it; ``load`` is that of one step.

        A caller that is cancelled leaves the queue. Raises ``LocalProtocolError`` if the
        computation itself failed.
        """
        job = Training(begin, load)
        self._jobs.append(job)
        self._arrived.set()
        try:
            await job.finished.wait()
        except trio.Cancelled:
            if job in self._jobs:
                self._jobs.remove(job)
            raise
        if job.error is not None:
            raise LocalProtocolError(
                f"The training step failed: {job.error}.", "The node goes on; see its log."
            ) from job.error
        assert job.steps is not None
        return job.steps

    def look(self) -> None:
        """There may be spare work."""
        self._arrived.set()

    async def serve(self) -> None:
        """Compute what comes, for ever. Runs in the node's nursery."""
        while True:
            self._arrived = trio.Event()
            turn = self._next_turn()
            if turn is not None:
                await self._take_turn(turn)
                continue
            with trio.move_on_at(math.inf if self._may_spare() else self._spare_at):
                await self._arrived.wait()

    def _next_turn(self) -> Turn | None:
        if self._queue or self._jobs:
            waiting, jobs = len(self._queue), len(self._jobs)
            training = training_is_due(waiting, jobs, self._turns_without_training)
            self._turns_without_training = 0 if training else self._turns_without_training + 1
            return self._training_turn() if training else self._rows_turn()
        return self._spare.spare_turn() if self._spare and self._may_spare() else None

    @property
    def _spare_at(self) -> float:
        return self._decoded_at + SPARE_AFTER_S

    def _may_spare(self) -> bool:
        return trio.current_time() >= self._spare_at

    async def _take_turn(self, turn: Turn) -> None:
        try:
            result = await self._compute.run(turn.compute, turn.load)
        except Exception as error:  # supervision point: bad luck of one turn, not of the node
            log.exception("a turn of %s failed", turn.what)
            turn.failed(error)
            return
        turn.done(result)

    def _training_turn(self) -> Turn:
        job = self._jobs[0]

        def failed(error: Exception) -> None:
            job.error = error
            self._finish_job(job)

        def done(left: int) -> None:
            self.training_steps += 1
            if not left:
                self._finish_job(job)

        return Turn("training", lambda: train_step(self.span, job), job.load, done, failed)

    def _rows_turn(self) -> Turn:
        queue = list(self._queue)
        if any(map(is_decode, queue)):
            self._decoded_at = trio.current_time()
        decoding = trio.current_time() - self._decoded_at < DECODING_S
        shares = plan_turn(queue, decoding=decoding, prefill_is_due=self._prefill_is_due)
        self._prefill_is_due = len(shares) < len(queue)
        pieces = [take(queue[share.index], share) for share in shares]

        def failed(error: Exception) -> None:
            for piece in pieces:
                piece.work.error = error
                self._finish(piece.work)

        def done(outputs: list[torch.Tensor]) -> None:
            for piece, output in zip(pieces, outputs, strict=True):
                self.tokens += len(output)
                piece.work.outputs.append(output)
                if piece.work.left == 0:
                    self._finish(piece.work)

        what, load = f"{len(pieces)} pieces", load_of(pieces)
        return Turn(what, lambda: compute_turn(self.span, pieces), load, done, failed)

    def _finish(self, work: Work) -> None:
        if work in self._queue:
            self._queue.remove(work)
        work.finished.set()

    def _finish_job(self, job: Training) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        job.finished.set()


def train_step(span: Span, job: Training) -> int:
    """The next step of a job, which begins with its first; how many are left."""
    if job.steps is None:
        job.steps = job.begin(span)
    job.steps.step()
    return job.steps.steps_left


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
