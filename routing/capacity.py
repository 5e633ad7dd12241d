"""What a placement is worth: tokens/s that the swarm's blocks can pass, all chains together.

A node that computes ``rate`` block-tokens/s (tokens/s through one block) and holds the window
``[start, end)`` may spread that rate over its blocks as the chains ask, since a chain may use any
part of a span. Every token passes every block once. So a placement carries T tokens/s if each
block can be given T from the nodes that hold it: a maximum flow from nodes to blocks. Nodes hold
intervals, so the graph is convex and one sweep finds the flow (Glover, "Maximum matching in a
convex bipartite graph", 1967): serve blocks in order, each from the node whose window ends first.
docs/placement.md states the same as linear programs.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum
from statistics import median
from typing import Literal, Protocol

PRECISION = 1e-6
"""Relative error of throughputs found by bisection."""
BELIEVED = 16.0
"""A peer counts for no more than so many of the middle one: what it says, nobody has measured."""

_Free = tuple[int, float]  # minus the end of a window, and the compute that is left on it
_Fit = tuple[float, int, float]  # compute for each block that a node can hold, blocks, compute

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
    fits = sorted(_fit(min(size, num_blocks), rate) for size, rate in nodes)
    room, working = sum(size for _, size, _ in fits), fsum(rate for _, _, rate in fits)
    return _bound(fits, room, working, num_blocks)


def _fit(size: int, rate: float) -> _Fit:
    return rate / size, size, rate


def _bound(fits: Sequence[_Fit], room: int, working: float, num_blocks: int) -> float:
    """``bound`` of nodes in ascending order, which have so much room and compute together."""
    if room < num_blocks:
        return 0.0
    # At small T every node is limited by its room; as T grows, the slowest per block give in first.
    # All must, until those that are left have less room than the model: these are at the end.
    first, room = len(fits), 0
    while room + fits[first - 1][1] < num_blocks:
        first -= 1
        room += fits[first][1]
    rest = fits[first:]
    working = fsum([working, *(-rate for _, _, rate in rest)])
    for limit, size, rate in rest:
        # T stays below ``limit`` if what works so far plus the room of the rest cannot carry more.
        if working + room * limit < num_blocks * limit:
            return working / (num_blocks - room)
        room -= size
        working += rate
    return working / num_blocks


class Board:
    """The compute on each window of a model's blocks, and how many peers hold each block.

    Sums are rounded once (fsum), so a board is the same on every node, and whether its peers came
    all at once or one by one.
    """

    def __init__(self, taken: Iterable[Seat], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.replicas = [0] * num_blocks
        self._peers: dict[tuple[int, int], list[float]] = {}  # rates of those with one window
        self._rates: list[dict[int, float]] = [{} for _ in range(num_blocks)]
        for seat in taken:
            self._peers.setdefault((seat.start, seat.end), []).append(seat.rate)
        for (start, end), rates in self._peers.items():
            self._rates[start][end] = fsum(rates)
            self._count(start, end, len(rates))

    def put(self, start: int, end: int, rate: float) -> None:
        """Add a peer's compute."""
        rates = self._peers.setdefault((start, end), [])
        rates.append(rate)
        self._rates[start][end] = fsum(rates)
        self._count(start, end, 1)

    def take(self, start: int, end: int, rate: float) -> None:
        """Take away what was put."""
        rates = self._peers[start, end]
        rates.remove(rate)
        if rates:
            self._rates[start][end] = fsum(rates)
        else:
            del self._peers[start, end], self._rates[start][end]
        self._count(start, end, -1)

    def windows(self) -> Iterator[tuple[int, int, int, float]]:
        """Start and end of every window that peers hold, how many they are, and their compute."""
        for (start, end), rates in self._peers.items():
            yield start, end, len(rates), self._rates[start][end]

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


class Seating:
    """Where all peers compute, kept up to date one record at a time.

    A peer counts for no more than ``BELIEVED`` times the middle one: one liar does not draw
    everybody away. However the seating came about, the same records make the same choices.
    """

    def __init__(self, records: Iterable[Record], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._said = {seat.peer_id: seat for seat in seats(records, num_blocks)}
        self._rates = sorted((seat.rate, peer_id) for peer_id, seat in self._said.items())
        self._most = self._believed()
        self.seats = {peer_id: self._capped(seat) for peer_id, seat in self._said.items()}
        self.counts = Counter(seat.status for seat in self.seats.values())
        self.board = Board(self.seats.values(), num_blocks)
        self.serving = [0] * num_blocks
        """How many peers hold each block and neither load nor move."""
        for seat in self.seats.values():
            self._serve(seat, 1)
        self._fits = sorted(_fit(seat.size, seat.rate) for seat in self.seats.values())

    def __len__(self) -> int:
        return len(self.seats)

    def update(self, record: Record) -> None:
        """A record arrives, of whatever state."""
        seat = _seat(record, self.num_blocks)
        if seat is None:
            self.drop(record.peer_id)
        else:
            self.put(seat)

    def put(self, seat: Seat) -> Seat | None:
        """The peer sits there from now on; where it sat before, by its own word."""
        before = self.drop(seat.peer_id)
        self._said[seat.peer_id] = seat
        insort(self._rates, (seat.rate, seat.peer_id))
        self._settle(self._capped(seat))
        self._believe_anew()
        return before

    def drop(self, peer_id: str) -> Seat | None:
        """The peer does not count any more; where it sat."""
        seat = self._said.pop(peer_id, None)
        if seat is not None:
            del self._rates[bisect_left(self._rates, (seat.rate, peer_id))]
            self._lift(peer_id)
            self._believe_anew()
        return seat

    def sit(self, peer_id: str, start: int, end: int) -> Seat | None:
        """The peer is on its way to another window; where it sat."""
        moved = replace(self._said[peer_id], start=start, end=end, status="moving")
        return self.put(moved)

    def bound(self, *more: tuple[int, float]) -> float:
        """``bound`` of the peers, and of ``more`` nodes beside them."""
        fits = self._fits
        room = sum(peers * (end - start) for start, end, peers, _ in self.board.windows())
        rates = [rate for _, _, _, rate in self.board.windows()]
        for size, rate in more:
            size = min(size, self.num_blocks)
            fits = fits.copy()
            insort(fits, _fit(size, rate))
            room += size
            rates.append(rate)
        return _bound(fits, room, fsum(rates), self.num_blocks)

    def middle_rate(self) -> float:
        """Half of the peers compute less; 1 where there are none."""
        rates = [min(rate, self._most) for rate, _ in self._rates]
        return median(rates) if rates else 1.0

    def _believed(self) -> float:
        return BELIEVED * self._rates[(len(self._rates) - 1) // 2][0] if self._rates else 0.0

    def _capped(self, seat: Seat) -> Seat:
        return replace(seat, rate=self._most) if seat.rate > self._most else seat

    def _believe_anew(self) -> None:
        """The middle peer changed: those who say more than is believed count differently."""
        before, self._most = self._most, self._believed()
        first = bisect_left(self._rates, (min(before, self._most), ""))
        for _, peer_id in self._rates[first:]:
            seat = self._capped(self._said[peer_id])
            if seat.rate != self.seats[peer_id].rate:
                self._lift(peer_id)
                self._settle(seat)

    def _settle(self, seat: Seat) -> None:
        self.seats[seat.peer_id] = seat
        self.counts[seat.status] += 1
        self.board.put(seat.start, seat.end, seat.rate)
        insort(self._fits, _fit(seat.size, seat.rate))
        self._serve(seat, 1)

    def _lift(self, peer_id: str) -> None:
        seat = self.seats.pop(peer_id)
        self.counts[seat.status] -= 1
        self.board.take(seat.start, seat.end, seat.rate)
        del self._fits[bisect_left(self._fits, _fit(seat.size, seat.rate))]
        self._serve(seat, -1)

    def _serve(self, seat: Seat, peers: int) -> None:
        if seat.status in ("still", "pinned"):
            for block in range(seat.start, seat.end):
                self.serving[block] += peers


class Trials:
    """What is missing for every block to carry ``tps``, and what one more peer would change.

    The state before each block is kept, so that a trial sweeps only the blocks that it changes.
    """

    def __init__(self, board: Board, tps: float) -> None:
        self._board = board
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
        free = self._marks[start][0].copy()
        insort(free, (-end, rate))
        return self._onward(start, end, free)

    def anew(self, start: int, end: int) -> float:
        """Block-tokens/s missing now that the board has changed in the window ``[start, end)``."""
        before, self._entering[start] = self._entering[start], self._board.entering(start)
        missing = self._onward(start, end, self._marks[start][0].copy())
        self._entering[start] = before
        return missing

    def _onward(self, start: int, end: int, free: list[_Free]) -> float:
        """What is missing in all if ``free`` is what there is before ``start``."""
        missing, last = self._marks[start][1], len(self._entering)
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
