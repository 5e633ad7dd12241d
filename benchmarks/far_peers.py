"""A made-up swarm on two continents, and plain ways to do what routing does, to compare with."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from petalnode.routing.announcement import Announcement
from petalnode.routing.search import Problem

Estimates = Callable[[int, int], float]
"""An estimator: a round trip in seconds for two peers."""
Claims = Mapping[int, Mapping[int, float]]
"""Measured round trips, by the peer that measured."""

OCEAN_S = 0.09
REGION_S = 0.012
ACCESS_S = 0.004
NOISE = 0.1
"""Share by which paths differ from the model that estimates assume."""


class World:
    """Round trips between ``peers`` peers, in seconds: an ocean, regions, access links, noise."""

    def __init__(self, peers: int, seed: int) -> None:
        rng = random.Random(seed)
        self.names = [f"12D3KooW{i:044d}" for i in range(peers)]
        places = [
            (rng.choice([0.0, OCEAN_S]) + rng.gauss(0, REGION_S), rng.gauss(0, REGION_S))
            for _ in range(peers)
        ]
        access = [rng.expovariate(1 / ACCESS_S) for _ in range(peers)]
        self.rtt_s = [[0.0] * peers for _ in range(peers)]
        for i in range(peers):
            for j in range(i):
                distance = math.dist(places[i], places[j]) + access[i] + access[j] + 2e-4
                self.rtt_s[i][j] = self.rtt_s[j][i] = distance * rng.lognormvariate(0, NOISE)
        self._rng = rng

    def measured(self, peer: int, count: int) -> list[int]:
        """Whom a peer measures: the nearest half of ``count``, and as many at random."""
        others = [j for j in range(len(self.names)) if j != peer]
        others.sort(key=lambda j: self.rtt_s[peer][j])
        near = count // 2
        return [*others[:near], *self._rng.sample(others[near:], count - near)]


def announcements(
    world: World, num_blocks: int, spans: tuple[int, int], rtts: int, seed: int
) -> list[Announcement]:
    """One record a peer of the world, with spans of ``spans`` blocks, anywhere in the model."""
    rng = random.Random(seed)
    records = []
    for i, name in enumerate(world.names):
        size = rng.randint(*spans)
        start = rng.randint(0, num_blocks - size)
        tps = rng.lognormvariate(math.log(100), 0.7)
        records.append(
            Announcement(
                peer_id=name,
                name="workstation",
                fingerprint="0123456789abcdef" * 2,
                start=start,
                end=start + size,
                state="online",
                decode_tps=tps,
                forward_tps=20 * tps,
                kv_tokens_free=rng.randint(4_000, 100_000),
                queue_depth=rng.randrange(3),
                dtype="bfloat16",
                max_context=8192,
                addrs=(f"/ip4/203.0.113.7/tcp/31330/p2p/{name}",),
                seq=1_800_000_000_000_000,
                issued_at=1_800_000_000.0,
                ttl_s=60.0,
                rtts={world.names[j][-10:]: world.rtt_s[i][j] for j in world.measured(i, rtts)},
            )
        )
    return records


def dijkstra(problem: Problem) -> float:
    """The least cost of a walk over (boundary, peer) states, by the textbook; seconds.

    The graph is a dictionary of edges, made for each search, as a graph library would have it.
    """
    start, end = (-1, -1), (-2, -2)
    edges: dict[tuple[int, int], list[tuple[tuple[int, int], float]]] = {}
    for state, onward, cost in _edges(problem, start, end):
        edges.setdefault(state, []).append((onward, cost))
    least = {start: 0.0}
    heap = [(0.0, start)]
    while heap:
        cost, state = heapq.heappop(heap)
        if state == end:
            return cost
        if cost > least[state]:
            continue
        for onward, more in edges.get(state, ()):
            if cost + more < least.get(onward, math.inf):
                least[onward] = cost + more
                heapq.heappush(heap, (cost + more, onward))
    return math.inf


State = tuple[int, int]


def _edges(problem: Problem, start: State, end: State) -> Iterator[tuple[State, State, float]]:
    """A state (b, i) stands behind block b - 1, computed by peer i."""
    graph, prices = problem.graph, problem.prices
    enter, leave, block_s = (x.tolist() for x in (prices.enter, prices.leave, prices.block_s))
    apart = graph.apart.tolist()
    for i in graph.holders[0].tolist():
        yield start, (1, i), float(problem.sender[i]) + enter[i] + block_s[i]
    for block in range(1, graph.num_blocks):
        holders = graph.holders[block].tolist()
        staying = set(holders)
        for i in graph.holders[block - 1].tolist():
            if i in staying:
                yield (block, i), (block + 1, i), block_s[i]
            for j in holders:
                if i != j:
                    cost = leave[i] + apart[j][i] + enter[j] + block_s[j]
                    yield (block, i), (block + 1, j), cost
    for i in graph.holders[-1].tolist():
        yield (graph.num_blocks, i), end, leave[i] + float(problem.receiver[i])


def triangle_midpoints(claims: Claims, unknown_s: float) -> Estimates:
    """Between the triangle bounds that common neighbours give; ``unknown_s`` where none is."""
    known: dict[int, dict[int, float]] = {i: dict(mine) for i, mine in claims.items()}
    for i, mine in claims.items():
        for j, rtt_s in mine.items():
            known[j][i] = rtt_s

    def estimate(i: int, j: int) -> float:
        common = known[i].keys() & known[j].keys()
        if not common:
            return unknown_s
        upper = min(known[i][k] + known[j][k] for k in common)
        lower = max(abs(known[i][k] - known[j][k]) for k in common)
        return (upper + lower) / 2

    return estimate


def moving_points(claims: Claims, samples: int, seed: int) -> Estimates:
    """Vivaldi as published, without heights: each peer moves itself by one sample at a time."""
    rng = random.Random(seed)
    points = {i: [rng.gauss(0, 0.01) for _ in range(3)] for i in claims}
    error = dict.fromkeys(claims, 1.0)
    for _ in range(samples):
        for i, mine in claims.items():
            j, rtt_s = rng.choice(list(mine.items()))
            distance = math.dist(points[i], points[j]) + 1e-9
            weight = error[i] / (error[i] + error[j])
            miss = min(abs(distance - rtt_s) / rtt_s, 1.0)
            error[i] += 0.25 * weight * (miss - error[i])
            pull = 0.25 * weight * (rtt_s - distance) / distance
            points[i] = [a + pull * (a - b) for a, b in zip(points[i], points[j], strict=True)]
    return lambda i, j: math.dist(points[i], points[j])


def relative_errors(
    world: World, claims: Claims, estimate: Estimates, pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """Of the estimates of all pairs that nobody measured, ascending."""
    return sorted(
        abs(estimate(i, j) - world.rtt_s[i][j]) / world.rtt_s[i][j]
        for i, j in pairs
        if j not in claims[i] and i not in claims[j]
    )
