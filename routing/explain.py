"""Why this chain, and why not each other peer: one short text a peer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np

from petalnode.errors import NoRoute
from petalnode.routing.announcement import Announcement
from petalnode.routing.bulk import narrowed
from petalnode.routing.chain import Gap, Route, Router
from petalnode.routing.coordinates import Floats
from petalnode.routing.costs import ANYTHING, Knowledge, Workload, why_not
from petalnode.routing.search import Problem, fill

_SAME_S = 1e-6
"""Costs nearer to each other than this are shown as equal."""


def explain(
    router: Router,
    records: Iterable[Announcement],
    known: Knowledge,
    workload: Workload = ANYTHING,
    *,
    gap: Gap | None = None,
    exclude: Collection[str] = (),
    route: Route | None = None,
) -> dict[str, str]:
    """For every peer id: its part in ``route``, or in the best chain, or why it has none.

    A peer that could serve is compared by the least cost of all chains that go through it. Without
    any chain, peers that could serve are told which blocks are missing.
    """
    everyone = list(records)
    gap = gap or Gap(0, router.num_blocks)
    exclude = gap.ends.union(exclude)
    texts = {a.peer_id: _unfit(a, router.num_blocks, workload, known, exclude) for a in everyone}
    try:
        route = route or router.find(everyone, known, workload, gap=gap, exclude=exclude)
    except NoRoute as none:
        return {peer_id: text or none.cause for peer_id, text in texts.items()}
    problem = router.problem(everyone, known, workload, gap, exclude)
    if workload.bulk:
        problem = replace(problem, prices=narrowed(problem.prices, route.stage_s))
    compared = _comparisons(router, problem, route)
    for hop in route.hops:
        compared[hop.peer_id] = f"used for {_blocks(hop.start, hop.end)}"
    limit = f"not among the {len(compared)} nearest and fastest peers that were compared"
    return {peer_id: text or compared.get(peer_id, limit) for peer_id, text in texts.items()}


def _unfit(
    a: Announcement, num_blocks: int, workload: Workload, known: Knowledge, exclude: Collection[str]
) -> str | None:
    if a.end > num_blocks:
        return f"its {_blocks(a.start, a.end)} are not of a model of {num_blocks}"
    return why_not(a, workload, known, exclude)


def _comparisons(router: Router, problem: Problem, route: Route) -> dict[str, str]:
    costs = cost_through(problem)
    texts = {}
    for a, cost_s in zip(router.columns.records, costs, strict=True):
        if a.end <= problem.first or a.start >= problem.last:
            texts[a.peer_id] = f"serves none of {_blocks(problem.first, problem.last)}"
        elif not np.isfinite(cost_s):
            texts[a.peer_id] = _impossible(problem, router.columns.index[a.peer_id], route)
        elif cost_s <= route.cost_s + _SAME_S:
            texts[a.peer_id] = f"as good: {_ms(cost_s)} through it"
        else:
            best = f"{_ms(route.cost_s)} by this chain"
            texts[a.peer_id] = f"slower: {best}, {_ms(cost_s)} through it"
    return texts


def _impossible(problem: Problem, peer: int, route: Route) -> str:
    stage_s = float(problem.prices.stage_s(1)[peer])
    if stage_s > route.stage_s:
        return f"too slow: {_ms(stage_s)} a token for one block, {_ms(route.stage_s)} here for all"
    return "no chain goes on from it"


def cost_through(problem: Problem) -> Floats:
    """The least cost [P] of all walks that visit each peer, infinite where there is none.

    For problems as they are posed, with nothing barred.
    """
    both = _come(problem)[:-1] + fill(problem).go[:-1]
    least: Floats = np.minimum.reduce(both, axis=0, initial=np.inf)
    return least


def _come(problem: Problem) -> Floats:
    """[blocks + 1, P]: the least cost of the way to each peer that is entered at each block."""
    graph, prices, first, last = problem.graph, problem.prices, problem.first, problem.last
    come = np.full((graph.num_blocks + 1, len(prices.enter)), np.inf)
    holders = graph.holders[first]
    come[first, holders] = (problem.sender + prices.enter)[holders]
    for block in range(first + 1, last):
        before, holders = graph.holders[block - 1], graph.holders[block]
        done = _done(problem, come, block)[before] + prices.leave[before]
        least = np.minimum.reduce(graph.legs[block] + done, axis=1, initial=np.inf)
        come[block, holders] = least + prices.enter[holders]
    return come


def _done(problem: Problem, come: Floats, block: int) -> Floats:
    """[P]: the least cost of having computed the block before ``block`` in each peer."""
    prices = problem.prices
    starts = np.arange(problem.first, block)
    lengths = (block - starts)[:, None]
    ways = come[problem.first : block] + lengths * prices.block_s
    ways[lengths > prices.cap] = np.inf
    least: Floats = np.minimum.reduce(ways, axis=0, initial=np.inf)
    return least


def _blocks(start: int, end: int) -> str:
    return f"block {start}" if end == start + 1 else f"blocks {start} to {end - 1}"


def _ms(seconds: float) -> str:
    ms = seconds * 1000
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"
