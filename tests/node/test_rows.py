"""The rows of one session on a hop: what is taken, what is charged, what is freed."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import trio

from petalnode.models.kv_cache import MIN_TOKENS, RowCache
from petalnode.protocol import Open, Segment, Step
from petalnode.serving.budget import KvBudget
from petalnode.serving.rows import Refusal, SessionRows

CONTEXT = 1000
BLOCKS = 3
ROOM = 10_000


class Blocks:
    """A span that computes nothing."""

    def __init__(self):
        self.config = SimpleNamespace(max_positions=CONTEXT)

    def new_row(self, start, end):
        return RowCache(start, end, 1, 2, torch.float32, torch.device("cpu"))


class Rows:
    """Rows of blocks ``[2, 5)``, whose steps are computed at once."""

    def __init__(self, rows=1, room=ROOM):
        self.budget = KvBudget(room, BLOCKS)
        opened = Open(bytes(16), "f" * 32, 2, 2 + BLOCKS, rows)
        self.rows = SessionRows(opened, Blocks(), self.budget)

    def take(self, *entries, **rest):
        """A step of (row, position, n) segments."""
        works = self.rows.prepare(step(*entries, **rest))
        for work in works:
            work.cache.truncate(work.position)
            for block in range(2, 5):
                work.cache.extend(block, torch.full((2, 1, work.n, 2), float(work.n)))
            work.cache.advance(work.n)
        self.rows.done()
        return works

    def refused(self, *entries, **rest):
        """The code and the reason; nothing has changed."""
        before, used = self.state(), self.budget.used
        with pytest.raises(Refusal) as caught:
            self.take(*entries, **rest)
        assert (self.state(), self.budget.used) == (before, used)
        return caught.value.code, str(caught.value)

    def state(self):
        return {row: (id(c), c.length) for row, c in self.rows._caches.items()}

    @property
    def lengths(self):
        return {row: cache.length for row, cache in self.rows._caches.items()}

    @property
    def held(self):
        """Block tokens of memory."""
        numbers = 2 * 1 * 2 * 4  # keys and values, heads, head size, float32
        return sum(cache.nbytes for cache in self.rows._caches.values()) // numbers


def step(*entries, seq=1, order=(), as_of=0):
    segments = tuple(Segment(row, position, n, 0) for row, position, n in entries)
    return Step(seq, segments, order=order, as_of=as_of)


def test_a_step_says_what_to_compute():
    rows = Rows(2)
    assert not rows.rows.in_use
    assert rows.rows.tuning is None
    rows.rows.tuning = added = object()
    first, second = rows.take((1, 0, 5), (0, 0, 3))
    assert rows.rows.in_use
    assert (first.position, first.n, first.tuning) == (0, 5, added)
    assert (second.n, second.tuning) == (3, added)
    assert first.cache is rows.rows._caches[1]
    assert (first.cache.start, first.cache.end) == (2, 5)
    (again,) = rows.take((1, 5, 2), seq=2)
    assert again.cache is first.cache
    assert rows.lengths == {1: 7, 0: 3}


def test_what_memory_holds_is_charged_and_given_back():
    rows = Rows(2)
    for seq, (n, capacity) in enumerate([(3, 64), (64, 64), (65, 96), (200, 200), (201, 300)]):
        rows.take((0, 0, n), seq=seq + 1)
        assert rows.budget.used == rows.held == BLOCKS * capacity
    rows.take((0, 10, 1), seq=9)  # rolled back: the memory stays
    assert rows.budget.used == rows.held == BLOCKS * 300
    rows.take((1, 0, 70), seq=10)
    assert rows.budget.used == rows.held == BLOCKS * (300 + 70)
    rows.rows.tuning = object()
    rows.rows.drop()
    assert (rows.budget.used, rows.held, rows.rows.in_use) == (0, 0, False)
    assert rows.rows.tuning is None
    rows.rows.drop()
    assert rows.budget.used == 0


def test_room_that_just_suffices_and_room_that_does_not():
    rows = Rows(2, room=128)
    rows.take((0, 0, 1))
    assert rows.refused((1, 0, 65), seq=2) == ("busy", "room for 64 more cached tokens only")
    rows.take((1, 0, 64), seq=3)
    assert rows.refused((1, 64, 1), seq=4) == ("busy", "room for 0 more cached tokens only")
    rows.take((1, 0, 60), seq=5)
    assert rows.lengths == {0: 1, 1: 60}


def test_a_gap_and_the_end_of_the_context():
    rows = Rows(2)
    for seq in (0, 1):
        assert rows.refused((0, 1, 1), seq=seq) == ("gap", "row 0 has 0 positions, not 1")
    rows.take((0, 0, 10))
    assert rows.refused((0, 11, 1), seq=2) == ("gap", "row 0 has 10 positions, not 11")
    assert rows.refused((1, 0, 1), (0, 12, 1), seq=2)[0] == "gap"
    full = ("context", f"the model's context is {CONTEXT} tokens")
    assert rows.refused((0, 10, CONTEXT - 9), seq=2) == full
    rows.take((0, 10, CONTEXT - 10), seq=2)
    assert rows.refused((0, CONTEXT, 1), seq=3) == full


def test_rows_are_rearranged_once():
    rows = Rows(3)
    rows.take((0, 0, 5), (1, 0, 6))
    first, second = rows.rows._caches[0], rows.rows._caches[1]
    rows.take((0, 6, 1), (1, 6, 1), (2, 5, 1), seq=2, order=(1, 1, 0))
    caches = rows.rows._caches
    assert (caches[0], caches[2]) == (second, first)
    assert caches[1] not in (first, second)
    assert rows.lengths == {0: 7, 1: 7, 2: 6}
    assert rows.budget.used == rows.held == BLOCKS * 3 * MIN_TOKENS
    rows.take((0, 7, 1), (1, 7, 1), (2, 6, 1), seq=2, order=(1, 1, 0))  # the same again
    assert (caches[0], rows.rows._caches[2]) == (second, first)
    rows.take((0, 7, 1), (1, 8, 1), (2, 6, 1), seq=3, order=(0, 1, 2))
    assert rows.lengths == {0: 8, 1: 9, 2: 7}


def test_a_row_that_comes_from_nothing_is_new():
    rows = Rows(3)
    rows.take((0, 0, 5))
    kept = rows.rows._caches[0]
    rows.take((2, 5, 1), (0, 0, 4), seq=2, order=(1, 1, 0))
    assert rows.lengths == {2: 6, 0: 4}
    assert rows.rows._caches[2] is kept
    assert rows.budget.used == rows.held == BLOCKS * 2 * MIN_TOKENS


def test_who_is_not_in_the_step_keeps_its_place_and_its_charge():
    rows = Rows(2)
    rows.take((0, 0, 100), (1, 0, 80))
    rows.take((0, 80, 1), seq=2, order=(1, 0))
    assert rows.lengths == {0: 81, 1: 100}
    assert rows.budget.used == rows.held == BLOCKS * (120 + 100)


def test_a_refused_rearrangement_has_not_happened():
    rows = Rows(2, room=128)
    rows.take((0, 0, 65))
    refused = rows.refused((0, 65, 1), (1, 65, 1), seq=2, order=(0, 0))
    assert refused == ("busy", "room for 63 more cached tokens only")
    assert rows.refused((0, 9, 1), seq=2, order=(1, 0))[0] == "gap"
    rows.take((1, 65, 1), seq=2, order=(1, 0))
    assert rows.lengths == {1: 66}


def test_rows_that_go_are_freed_before_others_are_copied(monkeypatch):
    """Otherwise a rearrangement takes twice what it is charged."""
    rows = Rows(3)
    rows.take((0, 0, 5), (1, 0, 5), (2, 0, 5))
    gone = [weakref.ref(rows.rows._caches[row]) for row in (0, 2)]
    copy, alive = RowCache.copy, []

    def noting(cache):
        alive.append([one() is not None for one in gone])
        return copy(cache)

    monkeypatch.setattr(RowCache, "copy", noting)
    rows.take((0, 5, 1), (1, 5, 1), (2, 5, 1), seq=2, order=(1, 1, 1))
    assert alive == [[False, False]] * 2


def test_a_replay_is_of_the_arrangement_that_the_rows_have():
    rows = Rows(2)
    rows.take((0, 0, 5), (1, 0, 5))
    rows.take((0, 5, 1), seq=4, order=(1, 0))
    kept = dict(rows.rows._caches)
    gap = ("gap", "the rows were rearranged since")
    for as_of in (0, 3):
        assert rows.refused((0, 0, 3), seq=0, as_of=as_of) == gap
    assert rows.refused((0, 3, 3), seq=0, as_of=5) == gap
    assert rows.refused((0, 0, 3), (1, 3, 1), seq=0, as_of=5) == gap
    rows.take((0, 3, 3), seq=0, as_of=4)
    assert rows.rows._caches == kept
    rows.take((1, 0, 7), seq=0, as_of=4)
    assert rows.lengths == {0: 6, 1: 7}


def test_a_whole_replay_of_a_later_arrangement_begins_anew():
    rows = Rows(2)
    rows.take((0, 0, 100), (1, 0, 5))
    old = rows.rows._caches[1]
    rows.take((1, 0, 3), seq=0, as_of=5)
    assert rows.lengths == {1: 3}
    assert rows.rows._caches[1] is not old
    assert rows.budget.used == rows.held == BLOCKS * MIN_TOKENS
    rows.take((0, 0, 4), seq=0, as_of=5)
    assert rows.lengths == {0: 4, 1: 3}
    rows.take((0, 3, 1), (1, 3, 1), seq=5, order=(1, 0))  # it has gone through that one
    assert rows.lengths == {0: 4, 1: 4}
    rows.take((0, 4, 1), seq=6, order=(1, 0))
    assert rows.rows._ordered == 6


def test_a_step_without_an_order_counts_for_none():
    rows = Rows(2)
    rows.take((0, 0, 5), seq=7)
    rows.take((0, 0, 5), seq=0, as_of=0)
    rows.take((0, 5, 1), (1, 0, 1), seq=3, order=(0, 0))
    assert rows.lengths == {0: 6, 1: 1}


async def test_who_waits_for_lengths_is_woken_by_the_step_that_brings_them():
    rows, came = Rows(2), []

    async def wait(*lengths):
        await rows.rows.wait_lengths(lengths)
        came.append(lengths)

    async with trio.open_nursery() as nursery:
        for lengths in ((0, 0), (5, 0), (5, 3), (6, 3)):
            nursery.start_soon(wait, *lengths)
        await trio.testing.wait_all_tasks_blocked()
        assert came == [(0, 0)]
        rows.take((0, 0, 5))
        await trio.testing.wait_all_tasks_blocked()
        assert came == [(0, 0), (5, 0)]
        rows.take((1, 0, 4), seq=2)
        await trio.testing.wait_all_tasks_blocked()
        assert came == [(0, 0), (5, 0), (5, 3)]
        rows.take((0, 5, 1), seq=3)
    assert came[-1] == (6, 3)
