"""The states of chain search: which peers hold which block, and how far they are from each other.

Made from spans and delays alone, which change seldom; prices, which change with every record and
session, come in at the search.
"""

from __future__ import annotations

import numpy as np

from petalnode.routing.coordinates import Floats, Indices
from petalnode.routing.delays import Delays


class Graph:
    """Peers 0..P-1 with spans ``[start, end)`` over ``num_blocks`` blocks.

    ``holders[b]`` are the peers whose span has block ``b``. ``legs[b]`` [holders of b, holders of
    b - 1] is the delay in seconds *from* each holder of block ``b - 1`` *to* each of block ``b``,
    infinite from a peer to itself; boundaries run from 1 to ``num_blocks - 1``.
    """

    def __init__(self, start: Indices, end: Indices, num_blocks: int, delays: Delays) -> None:
        self.start = start
        self.end = end
        self.num_blocks = num_blocks
        self.delays = delays
        within = end <= num_blocks
        self.holders: list[Indices] = [
            np.flatnonzero((start <= block) & (block < end) & within) for block in range(num_blocks)
        ]
        apart = delays.between.T.copy()
        np.fill_diagonal(apart, np.inf)
        self.legs: list[Floats] = [np.zeros((0, 0))] + [
            apart.take(self.holders[b], axis=0).take(self.holders[b - 1], axis=1)
            for b in range(1, num_blocks)
        ]
        self.apart = apart
