"""Which span a joining node takes: where the swarm is weakest.

The rule is the one of the Petals paper (arXiv 2312.08361, load balancing): of all windows, the one
whose sorted vector of block throughputs is lexicographically least. Unlike there, peers that are
still loading count, so that two nodes which join together do not take the same window.
"""

import math
from collections.abc import Iterable

from petalnode.routing.announcement import Announcement


def choose_window(
    announcements: Iterable[Announcement], num_blocks: int, size: int
) -> tuple[int, int]:
    """The window ``[start, end)`` of ``size`` blocks (at most all) that is least covered.

    ``announcements`` are the *other* peers. Ties go to the lowest start. ``size`` is at least 1.
    """
    size = min(size, num_blocks)
    weights = block_throughput(announcements, num_blocks)
    start = min(
        range(num_blocks - size + 1), key=lambda first: sorted(weights[first : first + size])
    )
    return start, start + size


def block_throughput(announcements: Iterable[Announcement], num_blocks: int) -> list[float]:
    """Decode tokens/s that each block has or is about to have, summed over its peers."""
    shares: list[list[float]] = [[] for _ in range(num_blocks)]
    for a in announcements:
        if a.state in ("joining", "online"):
            for block in range(a.start, min(a.end, num_blocks)):
                shares[block].append(a.decode_tps)
    # fsum: the same sum on every node, in whatever order the records came.
    return [math.fsum(share) for share in shares]
