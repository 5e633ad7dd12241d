"""The model of the epidemic layer."""

from math import inf
from random import Random

import pytest

from petalnode.simnet.swarm.gossip import (
    LINK_S,
    MESH_DEGREE,
    PROBE_S,
    SILENCE_S,
    Costs,
    Mesh,
    death_known_s,
    load,
    spread,
)


def test_a_message_reaches_everybody_by_the_shortest_ways() -> None:
    mesh = Mesh(60, Random(1), cpu_s=0.0)
    flood = mesh.flood(7)
    assert flood.heard_at_s[7] == 0.0
    assert max(flood.heard_at_s) < inf
    for node, links in enumerate(mesh.links):
        for other, delay in links.items():
            assert flood.heard_at_s[other] <= flood.heard_at_s[node] + delay + 1e-12


def test_copies_are_one_a_node_at_least_and_two_a_link_at_most() -> None:
    mesh = Mesh(60, Random(1))
    links = sum(map(len, mesh.links)) // 2
    assert 59 <= mesh.flood(7).copies <= 2 * links
    chain = Mesh(2, Random(1))
    assert chain.flood(0).copies == 1


def test_the_dead_neither_hear_nor_pass_on() -> None:
    mesh = Mesh(60, Random(2))
    around = set(mesh.links[7])
    flood = mesh.flood(7, without=around)
    assert [node for node, at in enumerate(flood.heard_at_s) if at < inf] == [7]
    assert flood.copies == 0


def test_everybody_looked_for_its_mesh_peers() -> None:
    assert min(map(len, Mesh(100, Random(3)).links)) >= MESH_DEGREE
    assert [len(links) for links in Mesh(3, Random(3)).links] == [2, 2, 2]


def test_a_death_is_known_after_silence_probe_accusation_and_confirmation() -> None:
    known_s = death_known_s(Mesh(60, Random(4)), 7, Random(4))
    assert SILENCE_S + PROBE_S < known_s < 30.0


def test_the_same_seed_gives_the_same_spread() -> None:
    assert spread(50, 1) == spread(50, 1) != spread(50, 2)
    assert spread(50, 1).news_s < 10 * LINK_S[1]


def test_beats_cost_no_more_in_a_larger_swarm_but_churn_does() -> None:
    assert load(10_000, 4.0).messages <= load(100, 4.0).messages
    assert load(10_000, 4.0, 3600.0).messages > 5 * load(1_000, 4.0, 3600.0).messages
    once = load(1_000, 4.0, costs=Costs(cpu_s=0.001, record_bytes=90, framing_bytes=10))
    assert once.received_bytes == pytest.approx(once.messages * 400)
    assert once.cpu == pytest.approx(once.messages * 0.001)
