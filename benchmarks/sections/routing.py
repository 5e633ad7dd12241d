"""Chain search, delays that are estimated, and what gossip costs: no process but this one."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

from benchmarks.far_peers import (
    Claims,
    World,
    announcements,
    dijkstra,
    moving_points,
    relative_errors,
    triangle_midpoints,
)
from benchmarks.report import Result, Table, Target, figure, percentile
from petalnode.p2p.envelope import seal
from petalnode.p2p.identity import new_identity
from petalnode.routing.announcement import Announcement
from petalnode.routing.beats import ANNOUNCED_RTTS, beat_interval, record_ttl
from petalnode.routing.chain import Gap, Router
from petalnode.routing.costs import Knowledge, Workload
from petalnode.routing.delays import UNKNOWN_RTT_S, estimate_delays
from petalnode.routing.explain import explain
from petalnode.routing.search import best_walk

BLOCKS, PEERS, SPANS = 80, 400, (5, 20)
MEASURED_HERE = 32
"""Peers whose round trip the searching node measured itself."""
SEARCH_MS, REFERENCE_MS = 2.0, 287.0
MEDIAN_ERROR = 0.15
PLACED, SAMPLES = 200, 100
SEED = 1


def run(quick: bool) -> Result:
    """Times are CPU time, which nothing waits in and others on the machine do not lengthen much."""
    rounds = 10 if quick else 40
    world = World(PEERS, SEED)
    records = announcements(world, BLOCKS, SPANS, ANNOUNCED_RTTS, SEED)
    known = Knowledge(rtts=dict(zip(world.names[:MEASURED_HERE], world.rtt_s[0], strict=False)))
    times = search_times(records, known, rounds)
    errors = {count: estimate_errors(count) for count in (4, ANNOUNCED_RTTS, 16)}
    ours = errors[ANNOUNCED_RTTS]["springs over gossip"]
    beside = times["Dijkstra, plain Python"] / times["after a beat"]
    names = list(errors[ANNOUNCED_RTTS])
    error_rows = [
        [f"{count} announced", *(cell(errors[count][name]) for name in names)] for count in errors
    ]
    return Result(
        f"Routing: {BLOCKS} blocks, {PEERS} peers with {SPANS[0]} to {SPANS[1]} blocks each",
        tables=[
            Table(("search", "ms of CPU"), [[name, f"{ms:.2f}"] for name, ms in times.items()]),
            Table(("round trips", *names), error_rows, "Error of estimates: median (90th %)"),
            gossip_table(records[0]),
        ],
        targets=[
            Target("chain search after a beat", times["after a beat"], SEARCH_MS, " ms"),
            Target("error of an estimated round trip, median", ours[0], MEDIAN_ERROR),
        ],
        notes=[
            f"The reference implementation takes {figure(REFERENCE_MS)} ms; Dijkstra's algorithm "
            f"in plain Python, which finds the same cost, {figure(beside)} × ours."
        ],
        values={"search_ms": times, "errors": {str(k): v for k, v in errors.items()}},
    )


def search_times(
    records: Sequence[Announcement], known: Knowledge, rounds: int
) -> dict[str, float]:
    """Median milliseconds of CPU time of each kind of search."""
    router, current = Router(BLOCKS), list(records)
    router.find(current, known)
    after, cached = after_changes(router, current, known), Workload(kv_tokens=8192)
    bulk, gap = Workload(bulk_tokens=1000), Gap(30, 42)
    times = {
        "after a beat": median_ms(after["a beat"], rounds),
        "with 8,192 tokens of cache": median_ms(
            lambda: router.find(current, known, cached), rounds
        ),
        "replacement for 12 blocks": median_ms(
            lambda: router.find(current, known, gap=gap), rounds
        ),
        "bulk, 1,000 tokens": median_ms(lambda: router.find(current, known, bulk), 5),
        "explaining all peers": median_ms(lambda: explain(router, current, known), 5),
        "after changed round trips": median_ms(after["changed round trips"], rounds),
        "for the first time": median_ms(lambda: Router(BLOCKS).find(current, known), 5),
    }
    problem = router.problem(current, known, Workload(), Gap(0, BLOCKS), ())
    found = best_walk(problem)
    assert found is not None
    assert abs(dijkstra(problem) - found.cost_s) < 1e-9
    return times | {"Dijkstra, plain Python": median_ms(lambda: dijkstra(problem), 3)}


def after_changes(
    router: Router, current: list[Announcement], known: Knowledge
) -> dict[str, Callable[[], object]]:
    """Searches, each after another record of ``current`` has changed in that way."""
    rng = random.Random(SEED)

    def after(change: Callable[[Announcement], dict[str, object]]) -> Callable[[], object]:
        def search() -> object:
            chosen = rng.randrange(len(current))
            a = current[chosen]
            current[chosen] = replace(a, seq=a.seq + 1, **change(a))
            return router.find(current, known, rng=rng)

        return search

    return {
        "a beat": after(lambda _: {"queue_depth": rng.randrange(3)}),
        "changed round trips": after(
            lambda a: {"rtts": {key: 1.5 * rtt for key, rtt in a.rtts.items()}}
        ),
    }


def median_ms(function: Callable[[], object], rounds: int) -> float:
    samples = []
    for _ in range(rounds):
        started = time.thread_time()
        function()
        samples.append(time.thread_time() - started)
    return 1000 * statistics.median(samples)


def estimate_errors(count: int) -> dict[str, tuple[float, float]]:
    """Median and 90th percentile of the relative errors, by method, with ``count`` round trips."""
    world = World(PLACED, SEED)
    claims: Claims = {
        i: {j: world.rtt_s[i][j] for j in world.measured(i, count)} for i in range(PLACED)
    }
    records = [
        replace(a, rtts={world.names[j]: rtt for j, rtt in claims[i].items()})
        for i, a in enumerate(announcements(world, BLOCKS, SPANS, count, SEED))
    ]
    between = estimate_delays(records, "", {}).between
    methods = {
        "springs over gossip": lambda i, j: 2 * float(between[i, j]),
        "points that move themselves": moving_points(claims, SAMPLES, SEED),
        "bounds by common neighbours": triangle_midpoints(claims, UNKNOWN_RTT_S),
    }
    pairs = list(combinations(range(PLACED), 2))
    found = {}
    for name, estimate in methods.items():
        errors = relative_errors(world, claims, estimate, pairs)
        found[name] = statistics.median(errors), percentile(errors, 0.9)
    return found


def cell(error: tuple[float, float]) -> str:
    return f"{error[0]:.0%} ({error[1]:.0%})"


def gossip_table(typical: Announcement) -> Table:
    """How often nodes speak in swarms of some sizes, and how long their records live."""
    identity = new_identity()
    addrs = tuple(addr.replace(typical.peer_id, identity.peer_id) for addr in typical.addrs)
    size = len(seal(identity, replace(typical, peer_id=identity.peer_id, addrs=addrs)))
    rows = [
        [
            f"{nodes:,} nodes",
            figure(beat_interval(nodes)),
            figure(nodes / beat_interval(nodes)),
            figure(size * nodes / beat_interval(nodes) / 1000),
            f"{record_ttl(nodes) / 60:.1f}",
        ]
        for nodes in (4, 16, 100, 1_000, 10_000)
    ]
    head = ("swarm", "beat, s", "records/s", "KB/s of records", "expiry, min")
    return Table(head, rows, f"Unchanged nodes; a record has {size} bytes")
