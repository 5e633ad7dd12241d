"""The least sum of costs over (block boundary, peer) states. Exact.

Two tables, filled from the last block to the first, hold the least cost of the rest of the way:

    go[b, i]     from peer i, which has just been entered, or goes on, at block b
    quit[b, i]   from peer i, which leaves at boundary b for another peer or for the receiver

    go[b, i]   = min over hops of n blocks:  n x block_s[i] + quit[b + n, i]
    quit[b, i] = leave[i] + min over peers j:  delay(i, j) + enter[j] + go[b, j]

Without a limit on n, go[b, i] = block_s[i] + min(go[b + 1, i], quit[b + 1, i]): a few vector
operations a boundary, O(blocks x holders²) in all. A session can use a peer once only, and the
cheapest walk through the states may come back to one (a slow peer with a long span, a fast one
inside it). Then the problem is split into three that forbid just that, and the cheapest wins:
branch and bound.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from petalnode.routing.coordinates import Floats, Indices
from petalnode.routing.costs import Prices
from petalnode.routing.graph import Graph

MAX_BRANCHES = 64
"""Parts of a problem that are looked at; then peers that come twice keep their longer visit."""


class Visit(NamedTuple):
    """Peer number ``peer`` computes the blocks ``[start, end)``."""

    peer: int
    start: int
    end: int


class Found(NamedTuple):
    """A chain and what it costs in seconds."""

    cost_s: float
    visits: tuple[Visit, ...]


@dataclass(frozen=True)
class Problem:
    """Cover blocks ``[first, last)``. ``sender``, ``receiver`` [P]: delays at both ends, seconds.

    ``barred`` maps blocks to [P]: infinite for peers that must not compute them, else 0.
    """

    graph: Graph
    prices: Prices
    first: int
    last: int
    sender: Floats
    receiver: Floats
    barred: Mapping[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Tables:
    """``go`` [blocks, P] and ``quit`` [blocks + 1, P] of a problem, infinite where impossible."""

    go: Floats
    quit: Floats


def solve(problem: Problem) -> Found | None:
    """The cheapest chain in which no peer comes twice, None if none was found.

    Equal costs go to the smaller peer number and to the longer hop.
    """
    found = branch_and_bound(problem, MAX_BRANCHES)
    return _confined(found) if isinstance(found, Problem) else found


def branch_and_bound(problem: Problem, branches: int) -> Found | Problem | None:
    """The same, exact: after so many branches, the most promising part that is still undecided."""
    order = itertools.count()  # so that the heap never compares problems
    best = best_walk(problem)
    heap = [(best.cost_s, next(order), best, problem)] if best else []
    for _ in range(branches):
        if not heap:
            return None
        _, _, found, asked = heapq.heappop(heap)
        twice = _came_back(found)
        if twice is None:
            return found
        for part in _split(asked, *twice):
            walk = best_walk(part)
            if walk is not None:
                heapq.heappush(heap, (walk.cost_s, next(order), walk, part))
    return heap[0][3] if heap else None


def best_walk(problem: Problem) -> Found | None:
    """The cheapest chain, in which a peer may come twice."""
    tables = fill(problem)
    holders = problem.graph.holders[problem.first]
    if not len(holders):
        return None
    ways = (problem.sender + problem.prices.enter + tables.go[problem.first])[holders]
    nearest = int(ways.argmin())
    if not np.isfinite(ways[nearest]):
        return None
    return Found(float(ways[nearest]), tuple(_walk(problem, tables, int(holders[nearest]))))


def fill(problem: Problem) -> Tables:
    """The tables, backward over the boundaries."""
    graph, prices, first, last = problem.graph, problem.prices, problem.first, problem.last
    shape = (graph.num_blocks + 1, len(prices.enter))
    go, leave = np.full(shape, np.inf), np.full(shape, np.inf)
    limited = prices.cap < np.minimum(graph.end, last) - np.maximum(graph.start, first)
    any_limited = bool(limited.any())
    ending = graph.holders[last - 1]
    leave[last, ending] = (prices.leave + problem.receiver)[ending]
    for block in range(last - 1, first - 1, -1):
        holders = graph.holders[block]
        rest = np.minimum(go[block + 1][holders], leave[block + 1][holders])
        rest += prices.block_s[holders]
        if block in problem.barred:
            rest += problem.barred[block][holders]
        if any_limited:
            few = limited[holders]
            rest[few] = _limited(problem, leave, block, holders[few])
        go[block][holders] = rest
        if block > first:
            before = graph.holders[block - 1]
            rest += prices.enter[holders]
            least = np.minimum.reduce(graph.legs[block] + rest[:, None], axis=0, initial=np.inf)
            least += prices.leave[before]
            leave[block][before] = least
    return Tables(go, leave)


def _limited(problem: Problem, leave: Floats, block: int, peers: Indices) -> Floats:
    """``go`` at a block for peers that may not run to the end of their span."""
    if not len(peers):
        return np.zeros(0)
    prices = problem.prices
    longest = min(int(prices.cap[peers].max()), problem.last - block)
    lengths = np.arange(1, longest + 1)[:, None]
    hops = leave[block + 1 : block + 1 + longest].take(peers, axis=1)
    hops += lengths * prices.block_s[peers]
    hops[lengths > prices.cap[peers]] = np.inf
    for barred, costs in problem.barred.items():
        if block <= barred < block + longest:
            hops[barred - block :] += costs[peers]
    least: Floats = np.minimum.reduce(hops, axis=0, initial=np.inf)
    return least


def _walk(problem: Problem, tables: Tables, peer: int) -> Iterator[Visit]:
    graph, prices = problem.graph, problem.prices
    block = problem.first
    while True:
        end = block + _hop_length(problem, tables, peer, block)
        yield Visit(peer, block, end)
        if end == problem.last:
            return
        holders = graph.holders[end]
        ways = graph.apart[:, peer] + prices.enter + tables.go[end]
        peer, block = int(holders[ways[holders].argmin()]), end


def _hop_length(problem: Problem, tables: Tables, peer: int, block: int) -> int:
    """How many blocks the best hop of ``peer`` from ``block`` has; the longest of equals."""
    prices = problem.prices
    longest = min(int(problem.graph.end[peer]), problem.last) - block
    longest = min(longest, int(prices.cap[peer]))
    costs = tables.quit[block + 1 : block + 1 + longest, peer].copy()
    costs += prices.block_s[peer] * np.arange(1, longest + 1)
    for barred, more in problem.barred.items():
        if block <= barred < block + longest:
            costs[barred - block :] += more[peer]
    return longest - int(costs[::-1].argmin())


def _came_back(found: Found) -> tuple[Visit, Visit] | None:
    """Two visits of one chain to the same peer."""
    seen: dict[int, Visit] = {}
    for visit in found.visits:
        if visit.peer in seen:
            return seen[visit.peer], visit
        seen[visit.peer] = visit
    return None


def _split(problem: Problem, one: Visit, two: Visit) -> Iterator[Problem]:
    """Three problems that together have every chain that visits the peer once at most.

    Between its two visits it paused at block ``one.end``: either it is done before that block, or
    it starts after it, or it computes that block.
    """
    peer, pause = one.peer, one.end
    yield _barring(problem, peer, range(pause, problem.last))
    yield _barring(problem, peer, range(problem.first, pause + 1))
    others = np.full(len(problem.sender), np.inf)
    others[peer] = 0.0
    barred = dict(problem.barred)
    barred[pause] = barred.get(pause, 0.0) + others
    yield replace(problem, barred=barred)


def _barring(problem: Problem, peer: int, blocks: range) -> Problem:
    only = np.zeros(len(problem.sender))
    only[peer] = np.inf
    barred = dict(problem.barred)
    for block in blocks:
        barred[block] = barred.get(block, 0.0) + only
    return replace(problem, barred=barred)


def _confined(problem: Problem) -> Found | None:
    """A chain without repetitions, not certain to be the cheapest."""
    while (found := best_walk(problem)) is not None:
        twice = _came_back(found)
        if twice is None:
            return found
        stays = max(twice, key=lambda visit: visit.end - visit.start)
        problem = _barring(problem, stays.peer, range(problem.first, stays.start))
        problem = _barring(problem, stays.peer, range(stays.end, problem.last))
    return None
