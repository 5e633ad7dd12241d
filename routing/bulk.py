"""Chains for bulk work, where many tokens are on their way at once: training, long prefills.

Once the pipeline is full, such work flows as fast as its busiest stage lets it: ``tokens`` tokens
take about

    the sum of costs along the chain + tokens x the longest time that one keeps a hop or link busy

Many short hops make the second term small and the first one large. For a given limit on the stages
the least sum is exact search with shorter hops, so a few limits are tried from the top down, until
peers would have to come twice: where that takes many branches to avoid, the swarm is used up.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from petalnode.routing.costs import Prices
from petalnode.routing.search import Found, Problem, branch_and_bound, solve

STEP = 0.1
"""Share by which the limit shrinks at least: of the times tried, none between is better by more."""
MAX_LIMITS = 16
MAX_BRANCHES = 3
"""Parts of one limit's problem that are looked at: this work must not stall the node."""
_ROUNDING = 1e-9


def solve_bulk(problem: Problem, tokens: int) -> Found | None:
    """A chain through which ``tokens`` tokens take little time, which is its ``cost_s``.

    No peer comes twice. None if no chain was found.
    """
    best: Found | None = None
    found: Found | Problem | None = solve(problem)
    for _ in range(MAX_LIMITS):
        if not isinstance(found, Found):
            break
        busiest_s = busiest_stage(problem.prices, found)
        total_s = found.cost_s + tokens * busiest_s
        if best is None or total_s < best.cost_s:
            best = Found(total_s, found.visits)
        limit_s = busiest_s * (1 - STEP)
        # Sums only grow from here on, and no stage is shorter than one block in the fastest peer.
        if found.cost_s + tokens * _shortest_stage(problem.prices) >= best.cost_s:
            break
        part = replace(problem, prices=narrowed(problem.prices, limit_s))
        found = branch_and_bound(part, MAX_BRANCHES)
    return best


def busiest_stage(prices: Prices, found: Found) -> float:
    """How long a token keeps the busiest hop of a chain busy, or its link; seconds."""
    return max(float(prices.stage_s(v.end - v.start)[v.peer]) for v in found.visits)


def narrowed(prices: Prices, stage_s: float) -> Prices:
    """The prices with every hop so short that no token keeps it busy for more than ``stage_s``."""
    blocks = np.floor(stage_s / prices.block_s + _ROUNDING)
    cap = np.minimum(prices.cap, blocks.astype(np.intp))
    fits = (cap > 0) & (prices.leave <= stage_s)
    return replace(prices, enter=np.where(fits, prices.enter, np.inf), cap=np.maximum(cap, 1))


def _shortest_stage(prices: Prices) -> float:
    return float(np.min(prices.stage_s(1), initial=np.inf, where=np.isfinite(prices.enter)))
