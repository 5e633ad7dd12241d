"""Who is alive, as nodes find out by themselves: deaths, silence, slander. Simulated worlds."""

import pytest
import trio

from petalnode.p2p.gossip import Gossip
from petalnode.simnet.world import World, open_world

KILLED_S = 3.0
"""Until a killed peer has left every view of a small swarm."""
SILENT_S = 15.0
"""The same for one whose machine lost its power: no connection breaks."""
NAMES = ("a", "b", "c", "d", "e", "f")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return str(tiny_checkpoint())


async def start_all(world: World, names=NAMES) -> None:
    for name in names:
        await world.start(name, blocks=(0, 1))
    await trio.sleep(6)


def views(world: World, names) -> dict[str, set[str]]:
    """Whom each node takes for alive, by name."""
    return {
        name: {world.name_of(a.peer_id) for a in world._members[name].node.swarm.live()}
        for name in names
    }


def all_see(viewers, seen) -> dict[str, set[str]]:
    return {name: set(seen) for name in viewers}


@pytest.mark.parametrize(("silent", "deadline_s"), [(False, KILLED_S), (True, SILENT_S)])
async def test_a_dead_peer_leaves_every_view(checkpoint, silent, deadline_s, autojump_clock):
    async with open_world(1, checkpoint, latency_s=0.02) as world:
        await start_all(world)
        assert views(world, NAMES) == all_see(NAMES, NAMES)
        rest = NAMES[:-1]
        world.kill("f", silent=silent)
        await trio.sleep(deadline_s)
        assert views(world, rest) == all_see(rest, rest)


async def test_those_who_are_not_connected_hear_of_a_death(checkpoint, autojump_clock, monkeypatch):
    monkeypatch.setattr("petalnode.probing.MESH_PEERS", 2)
    monkeypatch.setattr("petalnode.idling.RING_PEERS", 1)
    monkeypatch.setattr("petalnode.swarm.ANNOUNCED_RTTS", 0)
    names = [f"n{number}" for number in range(12)]
    async with open_world(2, checkpoint, latency_s=0.02) as world:
        await start_all(world, names)
        await trio.sleep(20)
        dead, rest = names[-1], names[:-1]
        nodes = [world._members[name].node for name in rest]
        near = sum(world.peer_id(dead) in node._host.connected_peers() for node in nodes)
        assert near < len(rest)
        world.kill(dead)
        await trio.sleep(KILLED_S)
        assert views(world, rest) == all_see(rest, rest)


async def test_one_who_cannot_reach_a_peer_does_not_make_the_others_lose_it(
    checkpoint, autojump_clock
):
    async with open_world(3, checkpoint, latency_s=0.02) as world:
        await start_all(world)
        await trio.sleep(20)  # everybody has a voice
        world.partition("a", "f")
        others = NAMES[1:]
        missing = 0
        for _ in range(120):
            await trio.sleep(0.5)
            missing += views(world, "a")["a"] != set(NAMES)
            assert views(world, others) == all_see(others, NAMES) | {"f": views(world, "f")["f"]}
        assert missing <= 4  # it is there, only not for a: every accusation is refuted at once
        accused = world._members["f"].node.swarm.gossip.suspicions
        assert not accused.suspected(trio.current_time())


async def test_a_node_that_is_cut_off_blames_nobody(checkpoint, autojump_clock, monkeypatch):
    accusers = set()
    accuse = Gossip.accuse

    async def overheard(gossip, suspicion):
        accusers.add(suspicion.accuser)
        await accuse(gossip, suspicion)

    monkeypatch.setattr(Gossip, "accuse", overheard)
    monkeypatch.setattr("petalnode.announcing.record_ttl", lambda size: 60.0)
    async with open_world(4, checkpoint, latency_s=0.02) as world:
        await start_all(world)
        world.partition("a", for_s=14)
        await trio.sleep(14)
        assert accusers
        assert world.peer_id("a") not in accusers
        await trio.sleep(20)
        assert views(world, NAMES) == all_see(NAMES, NAMES)
