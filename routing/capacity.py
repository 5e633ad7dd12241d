"""What a placement is worth: tokens/s that the swarm's blocks can pass, all chains together.

A node that computes ``rate`` block-tokens/s (tokens/s through one block) and holds the window
``[start, end)`` may spread that rate over its blocks as the chains ask, since a chain may use any
part of a span. Every token passes every block once. So a placement carries T tokens/s if each
block can be given T from the nodes that hold it: a maximum flow from nodes to blocks. Nodes hold
intervals, so the graph is convex and one sweep finds the flow (Glover, "Maximum matching in a
convex bipartite graph", 1967): serve blocks in order, each from the node whose window ends first.
docs/placement.md states the same as linear programs.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import fsum
from statistics import median_low
from typing import Literal, Protocol

PRECISION = 1e-6
"""Relative error of throughputs found by bisection."""
BELIEVED = 16.0
"""A peer counts for no more than so many of the middle one: what it says, nobody has measured."""

_Free = tuple[int, float]  # minus the end of a window, and the compute that is left on it

Status = Literal["still", "joining", "moving", "pinned"]


class Record(Protocol):
    """What placement reads of an announcement: the fields of ``routing.announcement``."""

    @property
    def peer_id(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def decode_tps(self) -> float: ...
    @property
    def moving_to(self) -> tuple[int, int] | None: ...
    @property
    def pinned(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one peer computes, or is about to: blocks ``[start, end)`` at ``rate`` block-tokens/s.

    Only "still" peers can be asked to move. Those "joining" or "moving" count where they will be.
    """

    peer_id: str
    start: int
    end: int
    rate: float
    status: Status = "still"

    @property
    def size(self) -> int:
        return self.end - self.start


def seats(records: Iterable[Record], num_blocks: int) -> list[Seat]:
    """The seats of all peers that serve or will, ordered by id so that all nodes sum alike."""
    found = (_seat(record, num_blocks) for record in records)
    return sorted((seat for seat in found if seat is not None), key=lambda seat: seat.peer_id)


def believed_seats(records: Iterable[Record], num_blocks: int) -> list[Seat]:
    """The same with no rate above ``BELIEVED`` medians: one liar does not draw everybody away."""
    said = seats(records, num_blocks)
    most = BELIEVED * median_low([seat.rate for seat in said]) if said else 0.0
    return [replace(seat, rate=most) if seat.rate > most else seat for seat in said]


def _seat(record: Record, num_blocks: int) -> Seat | None:
    target = record.moving_to
    leaving = record.state == "offline" or (record.state == "draining" and target is None)
    start, end = target or (record.start, record.end)
    end = min(end, num_blocks)
    if leaving or start >= end:
        return None
    rate = record.decode_tps * (record.end - record.start)
    return Seat(record.peer_id, start, end, rate, _status(record))


def _status(record: Record) -> Status:
    if record.moving_to is not None:
        return "moving"
    if record.state == "joining":
        return "joining"
    return "pinned" if record.pinned else "still"


def bound(nodes: Iterable[tuple[int, float]], num_blocks: int) -> float:
    """Tokens/s that no placement of ``nodes`` (blocks that fit, block-tokens/s) can exceed.

    The optimum of the linear program in docs/placement.md: the largest T with
    ``sum(min(rate, blocks * T)) >= num_blocks * T``. 0 if the nodes cannot hold every block.
    """
    fits: list[tuple[float, int, float]] = []
    room, working = 0, 0.0
    for size, rate in nodes:
        size = min(size, num_blocks)
        room += size
        fits.append((rate / size, size, rate))
    if room < num_blocks:
        return 0.0
    # At small T every node is limited by its room; as T grows, the slowest per block give in first.
    for limit, size, rate in sorted(fits):
        # T stays below ``limit`` if what works so far plus the room of the rest cannot carry more.
        if working + room * limit < num_blocks * limit:
            return working / (num_blocks - room)
        room -= size
        working += rate
    return working / num_blocks


class Board:
    """The compute on each window of a model's blocks, and how many peers hold each block."""

    def __init__(self, taken: Iterable[Seat], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.replicas = [0] * num_blocks
        self._rates: list[dict[int, float]] = [{} for _ in range(num_blocks)]
        shares: dict[tuple[int, int], list[float]] = {}
        for seat in taken:
            shares.setdefault((seat.start, seat.end), []).append(seat.rate)
        for (start, end), rates in shares.items():
            self._rates[start][end] = fsum(rates)
            self._count(start, end, len(rates))

    def put(self, start: int, end: int, rate: float) -> None:
        """Add a peer's compute; with a negative rate, take it away."""
        window = self._rates[start]
        left = window.get(end, 0.0) + rate
        if left > abs(rate) * PRECISION:
            window[end] = left
        else:
            window.pop(end, None)
        self._count(start, end, 1 if rate > 0 else -1)

    def shortfall(self, tps: float) -> float:
        """Block-tokens/s missing for every block to carry ``tps``; 0 if none are."""
        return Trials(self, tps).missing

    def throughput(self, limit: float) -> float:
        """The largest tokens/s, at most ``limit``, that the placement carries."""
        low, high = 0.0, limit
        if 0 in self.replicas:
            return 0.0
        if self.shortfall(limit) == 0:
            return limit
        while high - low > PRECISION * high:
            middle = (low + high) / 2
            if self.shortfall(middle) == 0:
                low = middle
            else:
                high = middle
        return low

    def entering(self, block: int) -> list[_Free]:
        """The compute of the windows that start at ``block``."""
        return [(-end, rate) for end, rate in self._rates[block].items()]

    def _count(self, start: int, end: int, peers: int) -> None:
        for block in range(start, end):
            self.replicas[block] += peers


class Trials:
    """What is missing for every block to carry ``tps``, and what one more peer would change.

    The state before each block is kept, so that a trial sweeps only the blocks that it changes.
    """

    def __init__(self, board: Board, tps: float) -> None:
        self._tps = tps
        self._entering = [board.entering(block) for block in range(board.num_blocks)]
        self._marks: list[tuple[list[_Free], float]] = []
        free: list[_Free] = []
        missing = 0.0
        for block in range(board.num_blocks):
            self._marks.append((free.copy(), missing))
            missing = self._sweep((block,), free, missing)
        self._missing = missing
        self.missing = self._whole(missing)

    def with_peer(self, start: int, end: int, rate: float) -> float:
        """Block-tokens/s missing if one more peer held ``[start, end)``."""
        marked, missing = self._marks[start]
        free = marked.copy()
        insort(free, (-end, rate))
        last = len(self._entering)
        while start < last:
            # Past the window, once all is as without the peer, the rest is known.
            stop = max(end, start + 1)
            missing = self._sweep(range(start, min(stop, last)), free, missing)
            start = stop
            if start < last and free == self._marks[start][0]:
                return self._whole(missing + self._missing - self._marks[start][1])
        return self._whole(missing)

    def _sweep(self, blocks: Iterable[int], free: list[_Free], missing: float) -> float:
        """Serve ``blocks`` in order from ``free``, whose last item ends first."""
        for block in blocks:
            for item in self._entering[block]:
                insort(free, item)
            wanted = self._tps
            while free:
                end, left = free[-1]
                if left > wanted and -end > block:
                    free[-1] = end, left - wanted
                    break
                free.pop()
                if -end > block:
                    wanted -= left
            else:
                missing += wanted
        return missing

    def _whole(self, missing: float) -> float:
        return missing if missing > self._tps * PRECISION else 0.0


def swarm_throughput(taken: Iterable[Seat], num_blocks: int) -> float:
    """Tokens/s that peers in their seats carry together."""
    taken = list(taken)
    best = bound(((seat.size, seat.rate) for seat in taken), num_blocks)
    return Board(taken, num_blocks).throughput(best)
