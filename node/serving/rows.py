"""The rows of cache that one session holds on a hop, and what they may take."""

from __future__ import annotations

import trio

from petalnode.models.kv_cache import MIN_TOKENS, RowCache
from petalnode.models.span import Span
from petalnode.models.tuning.tuning import Tuning
from petalnode.protocol import Open, Segment, Step
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import RowWork


class Refusal(Exception):
    """The step cannot be taken; the client is told ``code`` and why, and the session goes on."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


class SessionRows:
    """Caches of a session's rows over its blocks, charged to the node's budget as they grow."""

    def __init__(self, opened: Open, span: Span, budget: KvBudget) -> None:
        self.tuning: Tuning | None = None
        """What is added to the blocks for all rows."""
        self._opened, self._span, self._budget = opened, span, budget
        self._caches: dict[int, RowCache] = {}
        self._held = 0
        self._ordered = 0
        self._longer = trio.Event()

    @property
    def in_use(self) -> bool:
        """Whether anything was computed."""
        return bool(self._caches)

    def prepare(self, step: Step) -> list[RowWork]:
        """Rearrange rows if the step says so, make room, and return what to compute.

        Raises ``Refusal``; then nothing has changed.
        """
        self._check_order(step)
        order = step.order if step.seq > self._ordered else ()
        caches = {row: self._caches[s] for row, s in enumerate(order) if s in self._caches}
        if not order and (step.seq or step.as_of == self._ordered):
            caches = dict(self._caches)  # else what there is belongs to an arrangement that is past
        for segment in step.segments:
            self._check(segment, caches.get(segment.row))
        self._reserve(step, caches)
        self._caches = caches  # rows that go are freed before others are copied
        self._part_rows()
        self._ordered = max(self._ordered, step.as_of, step.seq if step.order else 0)
        return [RowWork(self._row(s.row), s.position, s.n, self.tuning) for s in step.segments]

    def done(self) -> None:
        """A step was computed: wake who waits for lengths."""
        longer, self._longer = self._longer, trio.Event()
        longer.set()

    async def wait_lengths(self, lengths: tuple[int, ...]) -> None:
        """Until every row has that many positions."""
        while any(
            length and (row not in self._caches or self._caches[row].length < length)
            for row, length in enumerate(lengths)
        ):
            await self._longer.wait()

    def drop(self) -> None:
        """Free everything."""
        self.tuning = None
        self._caches.clear()
        self._budget.resize(self._held, 0)
        self._held = 0

    def _check_order(self, step: Step) -> None:
        """A replay is of the arrangement that the rows have; a whole one may be of a later one."""
        partial = any(segment.position for segment in step.segments)
        later = step.as_of > self._ordered
        if step.seq == 0 and (partial or not later) and step.as_of != self._ordered:
            raise Refusal("gap", "the rows were rearranged since")

    def _check(self, segment: Segment, cache: RowCache | None) -> None:
        length = 0 if cache is None else cache.length
        if segment.position > length:
            raise Refusal(
                "gap", f"row {segment.row} has {length} positions, not {segment.position}"
            )
        limit = self._span.config.max_positions
        if segment.position + segment.n > limit:
            raise Refusal("context", f"the model's context is {limit} tokens")

    def _reserve(self, step: Step, caches: dict[int, RowCache]) -> None:
        """Charge what the memory takes: rolling back keeps it, and it grows in strides."""
        after = {row: cache.length for row, cache in caches.items()}
        after.update({s.row: s.position + s.n for s in step.segments})
        held = 0
        for row, length in after.items():
            cache = caches.get(row)
            held += max(length, MIN_TOKENS) if cache is None else cache.capacity_after(length)
        wanted = held * (self._opened.end - self._opened.start)
        if not self._budget.resize(self._held, wanted):
            raise Refusal("busy", f"room for {self._budget.tokens_free} more cached tokens only")
        self._held = wanted

    def _part_rows(self) -> None:
        """Copy a cache for each further row that goes on from it."""
        taken: set[RowCache] = set()
        for row, cache in self._caches.items():
            if cache in taken:
                self._caches[row] = cache.copy()
            taken.add(cache)

    def _row(self, row: int) -> RowCache:
        cache = self._caches.get(row)
        if cache is None:
            cache = self._span.new_row(self._opened.start, self._opened.end)
            self._caches[row] = cache
        return cache
