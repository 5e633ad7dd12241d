"""The linear programs of docs/placement.md, solved by HiGHS through scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from petalnode.routing.capacity import Seat


def solved_bound(nodes: Sequence[tuple[int, float]], num_blocks: int) -> float:
    """Tokens/s that no placement of ``nodes`` (blocks that fit, block-tokens/s) can exceed.

    Variables: T, and the work w of each node. Maximise T subject to: all work makes T on every
    block, ``sum(w) >= num_blocks * T``; nobody works more than it can, ``w <= rate``, nor gives
    any of its blocks more than T, ``w <= size * T``.
    """
    sizes = np.array([min(size, num_blocks) for size, _ in nodes], dtype=float)
    rates = np.array([rate for _, rate in nodes])
    if sizes.sum() < num_blocks:
        return 0.0
    scale = rates.sum() / num_blocks  # the solver's tolerances are absolute
    count = len(nodes)
    work = np.arange(1, count + 1)
    values = np.concatenate([np.ones(count), -sizes, -np.ones(count), [num_blocks]])
    rows = np.concatenate([work - 1, work - 1, np.full(count + 1, count)])
    at = np.concatenate([work, np.zeros(count, dtype=int), work, [0]])
    matrix = coo_array((values, (rows, at)), shape=(count + 1, count + 1)).tocsr()
    limits = [(0, None), *((0, rate / scale) for rate in rates)]
    goal = np.zeros(count + 1)
    goal[0] = -1.0
    answer = linprog(goal, A_ub=matrix, b_ub=np.zeros(count + 1), bounds=limits, method="highs")
    return float(-answer.fun * scale)


def solved_throughput(taken: Sequence[Seat], num_blocks: int) -> float:
    """Tokens/s that peers in their seats carry, however chains share out their compute.

    Variables: T, and the work of each peer on each block of its window. Maximise T subject to:
    every block gets T; nobody works more than its rate.
    """
    scale = sum(seat.rate for seat in taken) / num_blocks
    places = [(i, block) for i, seat in enumerate(taken) for block in range(seat.start, seat.end)]
    columns = np.arange(1, len(places) + 1)
    peers = np.array([peer for peer, _ in places])
    blocks = np.array([block for _, block in places])
    values = np.concatenate([np.ones(len(places)), -np.ones(len(places)), np.ones(num_blocks)])
    rows = np.concatenate([peers, len(taken) + blocks, len(taken) + np.arange(num_blocks)])
    at = np.concatenate([columns, columns, np.zeros(num_blocks, dtype=int)])
    matrix = coo_array((values, (rows, at)), shape=(len(taken) + num_blocks, len(places) + 1))
    most = np.concatenate([[seat.rate / scale for seat in taken], np.zeros(num_blocks)])
    goal = np.zeros(len(places) + 1)
    goal[0] = -1.0
    answer = linprog(goal, A_ub=matrix.tocsr(), b_ub=most, bounds=(0, None), method="highs")
    return float(-answer.fun * scale)
