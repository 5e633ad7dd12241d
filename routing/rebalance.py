"""Which peers should move, and when this one does.

Every node computes the same short list of moves from its view, and only those on it move: no herd.
A move is worth its price if it lessens what is missing for every block to carry what the swarm
could at best (``routing.capacity``), per block to load; blocks that stay stay loaded. A swarm that
carries ``BALANCED`` of its optimum is left alone, but for blocks of which there is only one copy.

A node that finds itself on the list waits, longer than news take to spread, and looks again before
it goes (``Rebalancer``). Its intent is then announced, so that the others count it where it will
be; it drains before it loads, so no session is dropped, and only peers whose blocks others serve
are asked, so there are others to take its sessions. A peer that is on the list and does not move is
passed over after a while.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import fsum
from random import Random
from typing import NamedTuple, Protocol

from petalnode.routing.capacity import Board, Record, Seat, Seating, Trials
from petalnode.routing.placement import WORTH_MOVING

BALANCED = 0.995
"""Share of its optimum at which a swarm is left alone."""
MAX_MOVING_SHARE = 0.01
"""Share of the peers that may be on the move at once; one always may."""
MAX_MOVES = 16
MAX_JOINING_SHARE = 0.2
"""While more newcomers load, nobody moves: newcomers go where most is missing."""
PRICE_BLOCKS = 2
"""What a move costs beside loading, in blocks: draining, and announcing twice."""
MAX_DONORS = 18
"""Peers for which every window is tried."""
CONFIRM_S = 3.0
"""How long a node must stay on the list before it goes: longer than gossip takes to spread."""
CONFIRM_HOLE_S = 1.0
PATIENCE_S = 30.0
"""How long the others wait for a peer on the list to announce its move."""
PATIENCE_HOLE_S = 4.0
STUCK_S = 600.0
"""Who has been on the move or joining for so long holds nobody back, and is not counted on."""
PASSED_OVER_S = 600.0
PASSED_OVER_HOLE_S = 60.0
GAVE_UP_S = 120.0
"""How long a node stays after sessions kept it from moving."""

_Turn = tuple[str, bool]  # who is on the list, and whether for a hole


@dataclass(frozen=True, slots=True)
class Move:
    """``peer_id`` should drain, then hold ``[start, end)``. ``loads``: blocks it lacks there.

    ``urgent``: blocks that nobody holds are among them.
    """

    peer_id: str
    start: int
    end: int
    loads: int
    urgent: bool = False


class Plan(Protocol):
    """What ``plan_moves`` is."""

    def __call__(
        self, records: Iterable[Record], num_blocks: int, *, passed: Collection[str] = ()
    ) -> tuple[Move, ...]: ...


def plan_moves(
    records: Iterable[Record], num_blocks: int, *, passed: Collection[str] = ()
) -> tuple[Move, ...]:
    """The moves that should begin now, best first; all nodes with the same view agree on them.

    Peers in ``passed`` are not asked to move; if they move or join, they hold nobody back, and are
    not counted on. Pinned peers are never asked. A hole that nobody is on the way to does not wait
    for those who move or join elsewhere: as many again may move to fill it.
    """
    return best_moves(Seating(records, num_blocks), passed)


def best_moves(seating: Seating, passed: Collection[str] = ()) -> tuple[Move, ...]:
    """``plan_moves`` of peers that are seated already; as they sit, they are left."""
    undo: list[Seat] = []
    for peer_id in passed:
        seat = seating.seats.get(peer_id)
        if seat is not None and seat.status in ("joining", "moving"):
            undo.extend(filter(None, [seating.drop(peer_id)]))
    moves = []
    for move in _moves(seating, passed):
        moves.append(move)
        undo.extend(filter(None, [seating.sit(move.peer_id, move.start, move.end)]))
    for seat in reversed(undo):
        seating.put(seat)
    return tuple(moves)


def _moves(seating: Seating, passed: Collection[str]) -> Iterator[Move]:
    """One after another; the one that asks for the next has made the last."""
    counts = dict(seating.counts)
    most = min(MAX_MOVES, max(1, int(len(seating) * MAX_MOVING_SHARE)))
    busy = counts.get("joining", 0) > 1 + len(seating) * MAX_JOINING_SHARE
    moving = counts.get("moving", 0)
    allowed = 0 if busy else most - moving
    for number in range(max(allowed, min(most, 2 * most - moving))):
        move = _best_move(seating, passed)
        if move is None or not (move.urgent or number < allowed):
            return
        yield move


class Rebalancer:
    """When a node moves. ``check`` it every few seconds and whenever the view changed.

    ``own``: for whom it decides, one node; in a simulator all that share a view. Time is any
    monotonic clock, in seconds. ``plan`` is there for those who keep a ``Seating``.
    """

    def __init__(
        self, own: Collection[str], num_blocks: int, rng: Random, plan: Plan = plan_moves
    ) -> None:
        self._own = own
        self._num_blocks = num_blocks
        self._rng = rng
        self._plan = plan
        self._listed: dict[_Turn, float] = {}  # since when each peer has been on the list
        self._waits: dict[_Turn, float] = {}  # until when those of our own wait
        self._moving: dict[str, float] = {}  # since when each peer has moved, or joined
        self._passed: dict[str, float] = {}  # until when
        self._gave_up: dict[str, float] = {}  # until when
        self._yielded: dict[str, Move] = {}  # what others may do first

    def check(self, records: Iterable[Record], now: float) -> tuple[Move, ...]:
        """The moves to make now. ``records`` are everybody's, this node's among them."""
        records = list(records)
        self._pass_over(records, now)
        moves = self._planned(records)
        turns = {(move.peer_id, move.urgent): move for move in moves}
        self._listed = {turn: self._listed.get(turn, now) for turn in turns}
        mine = {turn: move for turn, move in turns.items() if turn[0] in self._own}
        waits = self._waits
        self._waits = {t: waits[t] if t in waits else now + self._wait_s(t) for t in mine}
        return tuple(move for turn, move in mine.items() if now >= self._waits[turn])

    @property
    def passed(self) -> frozenset[str]:
        """Whom nobody waits for any more, as of the last ``check``."""
        return frozenset([*self._passed, *self._gave_up])

    def others_first(self, move: Move) -> None:
        """The node would rather not: whoever else is able may go, and it goes if nobody does."""
        self._yielded[move.peer_id] = move

    def gave_up(self, peer_id: str, now: float) -> None:
        """The node could not drain: it stays for a while."""
        self._gave_up[peer_id] = now + GAVE_UP_S

    def _wait_s(self, turn: _Turn) -> float:
        return (CONFIRM_HOLE_S if turn[1] else CONFIRM_S) * self._rng.uniform(1.0, 2.0)

    def _planned(self, records: Sequence[Record]) -> tuple[Move, ...]:
        """The list, without those who yielded for as long as there are others."""
        passed = self.passed
        while self._yielded:
            moves = self._plan(records, self._num_blocks, passed=passed.union(self._yielded))
            alone = [
                peer_id
                for peer_id, mine in self._yielded.items()
                if not any(other.urgent >= mine.urgent for other in moves)
            ]
            if not alone:
                return moves
            for peer_id in alone:
                del self._yielded[peer_id]
        return self._plan(records, self._num_blocks, passed=passed)

    def _pass_over(self, records: Iterable[Record], now: float) -> None:
        """No more waiting for those who are listed and do not move, or load and never arrive."""
        moving = [a.peer_id for a in records if a.moving_to is not None or a.state == "joining"]
        self._moving = {peer: self._moving.get(peer, now) for peer in moving}
        self._passed = {p: until for p, until in self._passed.items() if until > now}
        self._gave_up = {p: until for p, until in self._gave_up.items() if until > now}
        for peer, since in self._moving.items():
            if now - since < STUCK_S:  # it moves after all, and is counted on again
                self._passed.pop(peer, None)
            elif peer not in self._own:
                self._passed.setdefault(peer, now + PASSED_OVER_S)
        for (peer, urgent), since in self._listed.items():
            if peer not in self._own and now - since >= (PATIENCE_HOLE_S if urgent else PATIENCE_S):
                self._passed[peer] = now + (PASSED_OVER_HOLE_S if urgent else PASSED_OVER_S)


class _Merit(NamedTuple):
    """How good a move is; compared in this order. Both per block that it costs."""

    filled: float  # blocks that nobody held
    gained: float  # block-tokens/s, or copies once the swarm is balanced


class _Goal:
    """What a swarm could carry, and what it lacks for that."""

    def __init__(self, seating: Seating) -> None:
        best = seating.bound()
        self.board = seating.board
        self.fits = best > 0
        self.tps = best or fsum(seat.rate for seat in seating.seats.values()) / seating.num_blocks
        self._trials = Trials(self.board, self.tps)
        self.missing = self._trials.missing
        self.holes = self.board.replicas.count(0)
        self.singles = self.board.replicas.count(1)
        self._serving = seating.serving
        self.balanced = self.fits and self.board.shortfall(BALANCED * self.tps) == 0

    def slack(self, seat: Seat) -> float:
        """Share of the peer's compute that the swarm would not miss."""
        with _lifted(self.board, seat):
            lost = self._trials.anew(seat.start, seat.end) - self.missing
        return 1 - lost / seat.rate

    def can_spare(self, seat: Seat) -> bool:
        """Whether others serve all of the peer's blocks now: it drains before it loads."""
        return min(self._serving[seat.start : seat.end]) > 1

    def moves(self, seat: Seat) -> list[tuple[_Merit, Move]]:
        """The moves of a peer that are worth their price."""
        with _lifted(self.board, seat):
            places = _Places(self, seat)
            if not places.promising():
                return []
            starts = range(self.board.num_blocks - seat.size + 1)
            return [found for start in starts if (found := places.look(start)) is not None]


class _Places:
    """Where a peer that has been lifted off the board could go."""

    def __init__(self, goal: _Goal, seat: Seat) -> None:
        self._goal = goal
        self._seat = seat
        copies = goal.board.replicas
        self._empty = _counter(count == 0 for count in copies)
        self._single = _counter(count == 1 for count in copies)
        self._trials = Trials(goal.board, goal.tps * BALANCED if goal.balanced else goal.tps)

    def promising(self) -> bool:
        """Whether any place could win enough, were all of the peer's compute of use there."""
        goal, rate = self._goal, self._seat.rate
        if goal.holes or goal.balanced:
            return True
        return goal.missing - (self._trials.missing - rate) > WORTH_MOVING * rate

    def look(self, start: int) -> tuple[_Merit, Move] | None:
        """The move to ``start``, if it is worth its price."""
        seat, end = self._seat, start + self._seat.size
        first = max(start, seat.start)
        last = max(first, min(end, seat.end))  # what it keeps is [first, last)
        loads = seat.size - (last - first)
        if loads == 0:
            return None
        # Less what only it holds, which is nothing where it can be spared.
        given_up = self._empty[seat.end] - self._empty[seat.start]
        filled = self._empty[end] - self._empty[start] - given_up
        if filled < 0 or (given_up and not filled):
            return None
        gained = self._copies(start, end) if self._goal.balanced else self._compute(start, end)
        if not filled and gained <= 0:
            return None
        price = loads + PRICE_BLOCKS
        return _Merit(filled / price, gained / price), Move(
            seat.peer_id, start, end, loads, filled > 0
        )

    def _compute(self, start: int, end: int) -> float:
        """Block-tokens/s that the swarm wins; 0 if too little for a move."""
        rate = self._seat.rate
        gained = self._goal.missing - self._trials.with_peer(start, end, rate)
        enough = self._goal.fits and gained > WORTH_MOVING * rate
        return gained if enough else 0.0

    def _copies(self, start: int, end: int) -> float:
        """How many blocks fewer have no second copy, if the swarm stays balanced."""
        left = self._single[-1] - (self._single[end] - self._single[start])
        gained = self._goal.singles - left
        if gained <= 0 or self._trials.with_peer(start, end, self._seat.rate) > 0:
            return 0.0
        return float(gained)


@contextmanager
def _lifted(board: Board, seat: Seat) -> Iterator[None]:
    """The board without the peer."""
    board.take(seat.start, seat.end, seat.rate)
    yield
    board.put(seat.start, seat.end, seat.rate)


def _best_move(seating: Seating, passed: Collection[str]) -> Move | None:
    goal = _Goal(seating)
    if goal.balanced and not goal.singles:
        return None
    able = [
        seat
        for peer_id, seat in seating.seats.items()
        if seat.status == "still" and peer_id not in passed
    ]
    spare = [seat for seat in able if goal.can_spare(seat)]
    found = [item for seat in _donors(goal, spare) for item in goal.moves(seat)]
    if goal.holes and not found:  # nothing is served meanwhile, so nobody is indispensable
        found = [item for seat in _donors(goal, able) for item in goal.moves(seat)]
    best = max(found, key=lambda item: item[0], default=None)  # the first of equals
    return best[1] if best else None


def _donors(goal: _Goal, able: Sequence[Seat]) -> list[Seat]:
    """Those whom the swarm would miss least: of each window slowest, middle and fastest."""
    windows: dict[tuple[int, int], list[Seat]] = {}
    for seat in sorted(able, key=lambda seat: (seat.rate, seat.peer_id)):
        windows.setdefault((seat.start, seat.end), []).append(seat)
    slack = {window: goal.slack(peers[len(peers) // 2]) for window, peers in windows.items()}
    return [
        windows[window][index]
        for window in sorted(windows, key=lambda window: (-slack[window], window))
        for index in sorted({0, len(windows[window]) // 2, len(windows[window]) - 1})
    ][:MAX_DONORS]


def _counter(flags: Iterable[bool]) -> list[int]:
    """How many are true before each position."""
    return [0, *accumulate(flags)]
