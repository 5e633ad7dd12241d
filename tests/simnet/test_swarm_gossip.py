"""The model of the epidemic layer."""

from math import inf
from random import Random
from statistics import mean

import pytest

from petalnode.p2p.gossip import PUSHES_PER_S
from petalnode.p2p.mesh import DEGREE, DEGREE_HIGH, DEGREE_LOW, HEARTBEAT_S
from petalnode.routing.suspicion import CONFIRM_S
from petalnode.simnet.swarm.gossip import (
    LINK_S,
    PROBE_S,
    SILENCE_S,
    Costs,
    Mesh,
    Spread,
    death_known_s,
    load,
    longest_life_over,
    spread,
)

PUSHED, OFFERED = Spread(0.4, 20.0, 4.0, 0.0), Spread(4.0, 20.0, 1.0, 3.5)


def test_a_pushed_message_reaches_everybody_by_the_shortest_ways() -> None:
    mesh = Mesh(60, Random(1), cpu_s=0.0)
    flood = mesh.push(7)
    assert flood.heard_at_s[7] == 0.0
    assert max(flood.heard_at_s) < inf
    for node, links in enumerate(mesh.links):
        for other, delay in links.items():
            assert flood.heard_at_s[other] <= flood.heard_at_s[node] + delay + 1e-12


def test_pushed_copies_are_one_a_node_at_least_and_two_a_link_at_most() -> None:
    mesh = Mesh(60, Random(1))
    links = sum(map(len, mesh.links)) // 2
    assert 59 <= mesh.push(7).copies <= 2 * links
    assert Mesh(2, Random(1)).push(0).copies == 1


def test_an_offered_message_costs_each_node_one_copy_and_a_beat_a_hop() -> None:
    mesh = Mesh(60, Random(1), cpu_s=0.0)
    flood = mesh.offer(7, 0.5)
    assert flood.copies == 59
    links = sum(map(len, mesh.links)) // 2
    assert 2 * 59 <= flood.ids <= 2 * links + 59  # an offer and a question each, and idle offers
    for node, links_of in enumerate(mesh.links):
        for other, delay in links_of.items():
            latest = flood.heard_at_s[node] + HEARTBEAT_S + delay + 2 * LINK_S[1]
            assert flood.heard_at_s[other] <= latest
    assert flood.heard_at_s[7] == 0.5 < min(at for n, at in enumerate(flood.heard_at_s) if n != 7)


@pytest.mark.parametrize("pushed", [True, False])
def test_the_dead_neither_hear_nor_pass_on(pushed: bool) -> None:
    mesh = Mesh(60, Random(2))
    around = set(mesh.links[7])
    flood = mesh.flood(7, 0.0, around, pushed=pushed)
    assert [node for node, at in enumerate(flood.heard_at_s) if at < inf] == [7]
    assert flood.copies == 0


def test_the_mesh_is_as_gossipsub_grafts_it() -> None:
    degrees = [len(links) for links in Mesh(300, Random(3)).links]
    assert DEGREE_LOW <= min(degrees) <= max(degrees) <= DEGREE_HIGH
    assert DEGREE < mean(degrees) < DEGREE + 1.5  # 5.1 in a world of 24 real nodes
    assert [len(links) for links in Mesh(3, Random(3)).links] == [2, 2, 2]


@pytest.mark.parametrize("pushed", [True, False])
def test_a_death_is_known_after_silence_probe_accusation_and_confirmation(pushed: bool) -> None:
    known_s = death_known_s(Mesh(60, Random(4)), 7, Random(4), pushed=pushed)
    assert SILENCE_S + PROBE_S < known_s < 30.0


def test_there_is_time_for_a_refutation_even_where_all_is_offered() -> None:
    assert 2 * spread(1000, 1, pushed=False).news_s < CONFIRM_S


def test_the_same_seed_gives_the_same_spread() -> None:
    once = spread(50, 1, pushed=True)
    assert once == spread(50, 1, pushed=True) != spread(50, 2, pushed=True)
    assert once.news_s < 10 * LINK_S[1]
    assert spread(50, 1, pushed=False).news_s > once.news_s


def test_beats_cost_no_more_in_a_larger_swarm_but_churn_does() -> None:
    calm, large = (load(size, PUSHED, OFFERED) for size in (100, 10_000))
    assert large.messages <= calm.messages
    assert large.bytes <= calm.bytes
    busy, busier = (load(size, PUSHED, OFFERED, 3600.0) for size in (1_000, 10_000))
    assert busier.messages > 5 * busy.messages


def test_what_is_counted_is_counted_both_ways() -> None:
    costs = Costs(cpu_s=0.001, copy_cpu_s=0.0, message_bytes=100, id_bytes=10, rpc_bytes=0)
    once = load(1_000, PUSHED, OFFERED, costs=costs)
    offered = once.messages - PUSHES_PER_S
    one_way = PUSHES_PER_S * 4.0 * 100 + offered * (100 + 35)
    assert once.bytes == pytest.approx(2 * one_way)
    assert once.cpu == pytest.approx(once.messages * 0.001)


def test_a_stay_that_is_just_long_enough_meets_the_limit() -> None:
    life_s = longest_life_over(10_000, PUSHED, OFFERED, 5000.0)
    assert load(10_000, PUSHED, OFFERED, 1.01 * life_s).bytes < 5000.0
    assert load(10_000, PUSHED, OFFERED, 0.99 * life_s).bytes > 5000.0
