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
from collections.abc import Iterable
from math import fsum
from typing import NamedTuple

from petalnode.routing.capacity import Board, Record, Seating, Trials

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
    return best_window(Seating(announcements, num_blocks), size, rate, current)


def best_window(
    others: Seating,
    size: int,
    rate: float | None = None,
    current: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """``choose_window`` among peers that are seated already."""
    size = min(size, others.num_blocks)
    ranks = _ranks(others, size, others.middle_rate() if rate is None else rate)
    best = min(range(len(ranks)), key=lambda start: (ranks[start], start))
    if current is not None and current[1] - current[0] == size and current[1] <= others.num_blocks:
        here, there = ranks[current[0]], ranks[best]
        if here.filled == there.filled and here.missing - there.missing < WORTH_MOVING:
            return current
    return best, best + size


def block_throughput(board: Board) -> list[float]:
    """Tokens/s of each block if every peer splits its compute evenly over its window."""
    shares: list[list[float]] = [[] for _ in range(board.num_blocks)]
    for start, end, _, rate in board.windows():
        share = rate / (end - start)
        for block in range(start, end):
            shares[block].append(share)
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


def _ranks(others: Seating, size: int, rate: float) -> list[_Rank]:
    """One for each start."""
    board, goal = others.board, _goal(others, size, rate)
    trials = Trials(board, goal)
    weights = block_throughput(board)
    seams: Counter[int] = Counter()
    for start, end, peers, _ in board.windows():
        seams[start] += peers
        seams[end] += peers
    ranks = []
    for start in range(board.num_blocks - size + 1):
        end = start + size
        copies = board.replicas[start:end]
        # Rounded, so that what hardly differs leaves the choice to what comes next.
        missing = round(trials.with_peer(start, end, rate) / rate, 3)
        meeting = seams[start] + seams[end]
        vector = sorted(weights[start:end])
        level = round(LEVELS * fsum(vector) / size / goal)
        ranks.append(_Rank(-copies.count(0), missing, -copies.count(1), level, -meeting, vector))
    return ranks


def _goal(others: Seating, size: int, rate: float) -> float:
    """Tokens/s that the swarm could carry with this node; while blocks lack, an even share."""
    best = others.bound((size, rate))
    if best > 0:
        return best
    return fsum([*(seat.rate for seat in others.seats.values()), rate]) / others.num_blocks
