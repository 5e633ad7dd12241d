"""Which span a joining node takes: where it adds most to what the swarm can carry.

First come blocks that nobody holds. Then the window that leaves the least missing for every block
to carry what the swarm could at best (``routing.capacity``), which counts what chains can shift
between overlapping spans. Then blocks of which there is one copy, then seams: where other spans
begin and end, so that chains have fewer hops. Among equals the rule of the Petals paper decides
(arXiv 2312.08361, load balancing): the window whose sorted vector of block throughputs is
lexicographically least. Peers that are still loading count, so that two nodes which join together
do not take the same window.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import fsum
from statistics import median
from typing import NamedTuple

from petalnode.routing.capacity import Board, Record, Seat, Trials, believed_seats, bound

LEVELS = 40
"""Steps in which mean compute is compared: what differs by less leaves the choice to seams."""
WORTH_MOVING = 0.1
"""A change of place must win at least this share of the node's own compute."""


def choose_window(
    announcements: Iterable[Record],
    num_blocks: int,
    size: int,
    rate: float | None = None,
    current: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The window ``[start, end)`` of ``size`` blocks (at most all) where a node helps most.

    ``announcements`` are the *other* peers. ``rate`` is the node's own compute in block-tokens/s,
    by default the median of the others. ``current``: the window that it has announced and not yet
    loaded, kept unless another is clearly better. Ties go to the lowest start. ``size`` is at
    least 1.
    """
    size = min(size, num_blocks)
    others = believed_seats(announcements, num_blocks)
    if rate is None:
        rate = median([seat.rate for seat in others]) if others else 1.0
    ranks = _ranks(others, num_blocks, size, rate)
    best = min(range(len(ranks)), key=lambda start: (ranks[start], start))
    if current is not None and current[1] - current[0] == size and current[1] <= num_blocks:
        here, there = ranks[current[0]], ranks[best]
        if here.filled == there.filled and here.missing - there.missing < WORTH_MOVING:
            return current
    return best, best + size


def block_throughput(taken: Iterable[Seat], num_blocks: int) -> list[float]:
    """Tokens/s of each block if every peer splits its compute evenly over its window."""
    shares: list[list[float]] = [[] for _ in range(num_blocks)]
    for seat in taken:
        for block in range(seat.start, seat.end):
            shares[block].append(seat.rate / seat.size)
    # fsum: the same sum on every node, in whatever order the records came.
    return [fsum(share) for share in shares]


class _Rank(NamedTuple):
    """What speaks against a window; compared in this order, smaller is better."""

    filled: int  # minus the blocks that nobody else holds
    missing: float  # compute missing in the swarm, as a share of the node's own
    backed: int  # minus the blocks of which it is the second copy
    level: int  # mean compute on its blocks, coarsely
    seams: int  # minus the peers whose spans begin or end where it does: fewer hops
    weakness: list[float]  # the paper's vector


def _ranks(others: Sequence[Seat], num_blocks: int, size: int, rate: float) -> list[_Rank]:
    """One for each start."""
    board = Board(others, num_blocks)
    goal = _goal(others, num_blocks, size, rate)
    trials = Trials(board, goal)
    weights = block_throughput(others, num_blocks)
    seams = Counter(edge for seat in others for edge in (seat.start, seat.end))
    ranks = []
    for start in range(num_blocks - size + 1):
        end = start + size
        copies = board.replicas[start:end]
        # Rounded, so that what hardly differs leaves the choice to what comes next.
        missing = round(trials.with_peer(start, end, rate) / rate, 3)
        meeting = seams[start] + seams[end]
        vector = sorted(weights[start:end])
        level = round(LEVELS * fsum(vector) / size / goal)
        ranks.append(_Rank(-copies.count(0), missing, -copies.count(1), level, -meeting, vector))
    return ranks


def _goal(others: Sequence[Seat], num_blocks: int, size: int, rate: float) -> float:
    """Tokens/s that the swarm could carry with this node; while blocks lack, an even share."""
    nodes = [(seat.size, seat.rate) for seat in others] + [(size, rate)]
    return bound(nodes, num_blocks) or fsum(each for _, each in nodes) / num_blocks
