import math
import random
import statistics

import numpy as np
import pytest

from petalnode.routing.announcement import Announcement, rtt_key
from petalnode.routing.coordinates import COLD_ROUNDS, Springs, relax, scatter
from petalnode.routing.delays import UNKNOWN_RTT_S, Delays, estimate_delays

from .records import record


def between(delays: Delays, swarm: list[Announcement], a: str, b: str) -> float:
    names = [r.peer_id for r in swarm]
    return float(2 * delays.between[names.index(a), names.index(b)])


def swarm_of(claims: dict[str, dict[str, float]]) -> list[Announcement]:
    return [record(name, rtts=rtts) for name, rtts in sorted(claims.items())]


def test_of_two_claims_the_larger_counts() -> None:
    swarm = swarm_of({"a": {"b": 0.001}, "b": {"a": 0.08}})
    assert between(estimate_delays(swarm, "", {}), swarm, "a", "b") == pytest.approx(0.08)


def test_a_claim_may_name_a_peer_by_the_end_of_its_id() -> None:
    long = "12D3KooWSomePeerIdThatIsLong"
    swarm = swarm_of({"a": {rtt_key(long): 0.03}, long: {"a": 0.02}})
    assert between(estimate_delays(swarm, "", {}), swarm, "a", long) == pytest.approx(0.03)


def test_a_claim_by_one_end_counts_for_no_less_than_our_own_round_trips_allow() -> None:
    swarm = swarm_of({"far": {"near": 0.001}, "near": {}})
    delays = estimate_delays(swarm, "", {"far": 0.2, "near": 0.01})
    assert between(delays, swarm, "far", "near") == pytest.approx(0.19)
    assert between(delays, swarm, "near", "far") == pytest.approx(0.19)
    half_known = estimate_delays(swarm, "", {"far": 0.2})
    assert between(half_known, swarm, "far", "near") == pytest.approx(0.001)
    known_to_nobody = estimate_delays(swarm, "", {})
    assert between(known_to_nobody, swarm, "far", "near") == pytest.approx(0.001)


def test_what_nobody_measured_is_far() -> None:
    swarm = swarm_of({"a": {}, "b": {}})
    delays = estimate_delays(swarm, "", {"a": 0.02})
    assert between(delays, swarm, "a", "b") == UNKNOWN_RTT_S
    assert (2 * delays.here).tolist() == [0.02, UNKNOWN_RTT_S]
    assert between(delays, swarm, "a", "a") == 0.0


def test_our_own_record_is_as_far_as_we_are() -> None:
    swarm = swarm_of({"me": {"a": 9.0}, "a": {"me": 0.01}})
    delays = estimate_delays(swarm, "me", {"a": 0.03, "me": 0.0})
    assert between(delays, swarm, "me", "a") == pytest.approx(0.03)
    names = [r.peer_id for r in swarm]
    assert delays.here[names.index("me")] == 0.0


class World:
    """Two continents, 90 ms apart, and access links of some milliseconds; 10 % of noise."""

    def __init__(self, peers: int, seed: int) -> None:
        rng = random.Random(seed)
        self.names = [f"p{i:03}" for i in range(peers)]
        places = {
            name: (rng.choice([0.0, 0.09]) + rng.gauss(0, 0.012), rng.gauss(0, 0.012))
            for name in self.names
        }
        access = {name: rng.expovariate(1 / 0.004) for name in self.names}
        self.rtt = {
            frozenset((a, b)): (math.dist(places[a], places[b]) + access[a] + access[b] + 0.0002)
            * rng.lognormvariate(0, 0.1)
            for a in self.names
            for b in self.names
            if a < b
        }
        self.claims = {}
        for name in self.names:
            others = sorted(self.names, key=lambda other: self.between(name, other))[1:]
            asked = [*others[:4], *rng.sample(others[4:], 4)]
            self.claims[name] = {other: self.between(name, other) for other in asked}

    def between(self, a: str, b: str) -> float:
        return self.rtt.get(frozenset((a, b)), 0.0)


def errors_of_estimates(world: World, swarm: list[Announcement], delays: Delays) -> list[float]:
    index = {r.peer_id: k for k, r in enumerate(swarm)}
    return [
        abs(2 * delays.between[index[a], index[b]] - world.between(a, b)) / world.between(a, b)
        for a in world.names
        for b in world.names
        if a < b and b not in world.claims[a] and a not in world.claims[b]
    ]


def test_pairs_that_nobody_measured_are_estimated() -> None:
    world = World(100, seed=1)
    swarm = swarm_of(world.claims)
    cold = estimate_delays(swarm, "", {})
    errors = errors_of_estimates(world, swarm, cold)
    assert statistics.median(errors) < 0.15
    assert sorted(errors)[int(0.9 * len(errors))] < 0.5
    warm = estimate_delays(swarm, "", {}, cold.places)
    assert statistics.median(errors_of_estimates(world, swarm, warm)) < 0.15


def test_a_peer_that_we_never_measured_is_estimated_from_here_too() -> None:
    world = World(60, seed=2)
    swarm = [r for r in swarm_of(world.claims) if r.peer_id != "p000"]
    mine = {name: world.between("p000", name) for name in world.names[1:13]}
    delays = estimate_delays(swarm, "", mine)
    errors = [
        abs(2 * delays.here[k] - world.between("p000", r.peer_id))
        / world.between("p000", r.peer_id)
        for k, r in enumerate(swarm)
        if r.peer_id not in mine
    ]
    assert statistics.median(errors) < 0.25


def test_a_liar_draws_nobody_near() -> None:
    """It claims to be next door to peers on both continents."""
    world = World(60, seed=3)
    liar, victims = "p000", world.names[1:17]
    claims = world.claims | {liar: dict.fromkeys(victims, 1e-5)}
    honest = {n: {p: r for p, r in c.items() if p != liar} for n, c in claims.items() if n != liar}
    swarm = swarm_of(honest | {liar: claims[liar]})
    delays = estimate_delays(swarm, "", {})
    index = {r.peer_id: k for k, r in enumerate(swarm)}
    got = [2 * delays.between[index[liar], index[v]] for v in victims]
    assert statistics.median(got) > 0.01
    assert max(got) < UNKNOWN_RTT_S
    world.names.remove(liar)
    assert statistics.median(errors_of_estimates(world, swarm, delays)) < 0.15


def test_springs_find_their_lengths() -> None:
    i, j, rtt_s = np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([0.03, 0.04, 0.05])
    springs = Springs(i, j, rtt_s, np.ones(3))
    embedding = relax(springs, scatter(4, 0.04), COLD_ROUNDS)
    assert embedding.rtts()[[0, 1, 2], [1, 2, 0]] == pytest.approx([0.03, 0.04, 0.05], rel=0.05)
    assert (embedding.points[3] == scatter(4, 0.04).points[3]).all()
    assert (embedding.heights >= 0).all()


def test_a_claim_by_one_end_moves_that_end_alone() -> None:
    start = scatter(2, 0.04)
    springs = Springs(np.array([0]), np.array([1]), np.array([0.001]), np.zeros(1))
    embedding = relax(springs, start, COLD_ROUNDS)
    assert (embedding.points[1] == start.points[1]).all()
    assert (embedding.points[0] != start.points[0]).all()
    assert embedding.rtts()[0, 1] < start.rtts()[0, 1]
