"""The load balancing of Petals as published: the baseline that ``routing.rebalance`` must beat.

arXiv 2312.08361, section on load balancing, with the constants and the order of steps of the
program that the authors run. A joining server takes the window whose sorted vector of block
throughputs is lexicographically least. At random times each server asks what the weakest block
would get if it, and then everybody else in turn, moved to their best place; it moves if the swarm
has less than ``BALANCE_QUALITY`` of that. It stops serving at once, drops what runs, and reloads
all its blocks. Every server decides alone: all that see the same imbalance move.
"""

from collections.abc import Iterable
from random import Random

from petalnode.routing.capacity import Record, Seat, seats

BALANCE_QUALITY = 0.75
MEAN_CHECK_PERIOD_S = 120.0
"""Between two checks pass 0 to twice as many seconds."""
MEAN_SELECTION_DELAY_S = 5.0
"""Before blocks are chosen pass 0 to twice as many seconds."""
_EPSILON = 1e-3  # keeps rounding from looking like an improvement


def choose_start(records: Iterable[Record], num_blocks: int, size: int) -> int:
    """Where a joining server that fits ``size`` blocks begins."""
    return _best_start(_loads(_servers(records, num_blocks), num_blocks), min(size, num_blocks))


def should_move(
    peer_id: str,
    records: Iterable[Record],
    num_blocks: int,
    rng: Random,
    quality: float = BALANCE_QUALITY,
) -> bool:
    """Whether ``peer_id``, which is among ``records``, leaves its place to choose again."""
    servers = _servers(records, num_blocks)
    loads = _loads(servers, num_blocks)
    before = min(loads)
    # No placement gives the weakest block more than the mean: a balanced swarm needs no search.
    if before >= (quality - _EPSILON) * sum(loads) / num_blocks:
        return False
    own = next(server for server in servers if server.peer_id == peer_id)
    own.lift(loads)
    if before > _EPSILON and min(loads) <= 0:
        return False  # blocks would be left without any server
    start = _best_start(loads, own.size)
    if start == own.start:
        return False
    own.settle(loads, start)
    _move_all(servers, loads, rng)
    after = min(loads)
    if after < before or after < _EPSILON:
        return False
    return before / after < quality - _EPSILON


class _Server:
    """A server on the drawing board, which may be moved about."""

    def __init__(self, seat: Seat) -> None:
        self.peer_id = seat.peer_id
        self.start = seat.start
        self.size = seat.size
        # A request uses about half of a server's blocks: so Petals measures throughput.
        self.throughput = seat.rate * 2 / (seat.size + 1)

    def lift(self, loads: list[float]) -> None:
        """Take its throughput away, and a hair more, so that staying looks best among equals."""
        for block in range(self.start, self.start + self.size):
            loads[block] -= self.throughput * (1 + _EPSILON)

    def settle(self, loads: list[float], start: int) -> None:
        """Give the hair back and add its throughput at ``start``."""
        for block in range(self.start, self.start + self.size):
            loads[block] += self.throughput * _EPSILON
        self.start = start
        for block in range(start, start + self.size):
            loads[block] += self.throughput


def _servers(records: Iterable[Record], num_blocks: int) -> list[_Server]:
    return [_Server(seat) for seat in seats(records, num_blocks)]


def _loads(servers: Iterable[_Server], num_blocks: int) -> list[float]:
    loads = [0.0] * num_blocks
    for server in servers:
        for block in range(server.start, server.start + server.size):
            loads[block] += server.throughput
    return loads


def _move_all(servers: list[_Server], loads: list[float], rng: Random) -> None:
    """Everybody to their best place, again and again until nobody wants to."""
    moved = True
    while moved:
        moved = False
        for server in rng.sample(servers, len(servers)):
            server.lift(loads)
            start = _best_start(loads, server.size)
            moved = moved or start != server.start
            server.settle(loads, start)


def _best_start(loads: list[float], size: int) -> int:
    """The first window with the lexicographically least sorted vector.

    Its least element is the least of all blocks, so only windows with such a block compete.
    """
    weakest, last = min(loads), len(loads) - size
    starts = {
        start
        for block, load in enumerate(loads)
        if load == weakest
        for start in range(max(0, block - size + 1), min(block, last) + 1)
    }
    return min(starts, key=lambda start: (sorted(loads[start : start + size]), start))
