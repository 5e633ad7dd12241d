"""Connections of a whole swarm: few, and yet everybody hears of everybody. Simulated worlds."""

from statistics import mean

import pytest
import trio

from petalnode import idling
from petalnode.p2p import mesh
from petalnode.p2p.gossip import Gossip
from petalnode.session.session import GenerateOptions
from petalnode.simnet.world import World, open_world

NAMES = [f"n{number:02}" for number in range(24)]
SPARE, SHORTLY_S = 8, 6.0
"""Less of everything than outside of tests, so that it shows soon and in few nodes."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return str(tiny_checkpoint(eos_token_id=None))


@pytest.fixture(autouse=True)
def few_and_soon(monkeypatch):
    monkeypatch.setattr(idling, "SPARE_CONNECTIONS", SPARE)
    monkeypatch.setattr(idling, "IDLE_S", SHORTLY_S)
    monkeypatch.setattr("petalnode.probing.MESH_PEERS", SPARE // 2)


def hosts(world: World, names=NAMES):
    return [world._members[name].node._host for name in names]


def incomplete(world: World, names, viewers=None) -> dict[str, set[str]]:
    """Whose views, of the ``viewers``, differ from ``names``, and in what."""
    found = {}
    for name in viewers or names:
        view = {world.name_of(a.peer_id) for a in world._members[name].node.swarm.live()}
        if view != set(names):
            found[name] = view ^ set(names)
    return found


async def test_connections_stay_few_while_all_goes_on(checkpoint, autojump_clock, monkeypatch):
    accused = []
    accuse = Gossip.accuse

    async def overheard(gossip, suspicion):
        accused.append(world.name_of(suspicion.accused))
        await accuse(gossip, suspicion)

    monkeypatch.setattr(Gossip, "accuse", overheard)
    async with open_world(5, checkpoint, latency_s=0.02) as world:
        for number, name in enumerate(NAMES):
            await world.start(name, blocks=(0, 2) if number % 2 else (2, 4))
        client = await world.start("client")
        closed = []
        for host in hosts(world):
            host.on_disconnect(closed.append, goodbye=True)
        async with client.open_session() as session:
            await trio.sleep(6 * SHORTLY_S)  # in which it does nothing
            assert [hop.peer_id in client._host.connected_peers() for hop in session.chain.hops]
            tokens = [t async for t in session.generate([5], GenerateOptions(max_new_tokens=3))]
            assert len(tokens) == 3
        degrees = [len(host.connected_peers()) for host in hosts(world)]
        assert SPARE / 2 <= min(degrees) <= mean(degrees) <= 1.5 * SPARE
        # Both ends agree on what to keep: hardly anything is closed twice.
        assert len(NAMES) < len(closed) < 20 * len(NAMES)
        assert incomplete(world, NAMES) == {}
        assert not accused  # to be sent away is not to be dead
        world.kill(NAMES[3], silent=True)
        rest = [name for name in NAMES if name != NAMES[3]]
        await trio.sleep(30)
        assert incomplete(world, rest) == {}
        assert set(accused) == {NAMES[3]}


async def test_many_clients_of_few_nodes_go_on_hearing_of_all(
    checkpoint, autojump_clock, monkeypatch
):
    monkeypatch.setattr(idling, "SPARE_GUESTS", SPARE)
    monkeypatch.setattr(mesh, "DEGREE_HIGH", 5)
    names, clients = NAMES[:4], [f"client{number:02}" for number in range(20)]
    async with open_world(9, checkpoint, latency_s=0.02) as world:
        for name in names:
            await world.start(name, blocks=(0, 4))
        for client in clients:
            await world.start(client)
        sent_away = []
        for host in hosts(world, clients):
            host.on_disconnect(sent_away.append, goodbye=True)
        await trio.sleep(2 * SHORTLY_S)
        for _ in range(20):
            await trio.sleep(2)
            assert incomplete(world, names, clients) == {}
        assert len(sent_away) > len(clients)
        await world.stop(names[0])
        await trio.sleep(4)
        assert incomplete(world, names[1:], clients) == {}


async def test_both_halves_of_a_split_swarm_find_one_another(checkpoint, autojump_clock):
    names = NAMES[:12]
    async with open_world(7, checkpoint, latency_s=0.02) as world:
        for name in names:
            await world.start(name, blocks=(0, 4))
        await trio.sleep(4 * SHORTLY_S)
        halves = [(a, b) for a in names[:6] for b in names[6:]]
        for a, b in halves:
            world.partition(a, b)
        await trio.sleep(30)
        assert incomplete(world, names[:6]) == incomplete(world, names[6:]) == {}
        for a, b in halves:
            world.heal(a, b)
        await trio.sleep(30)
        assert incomplete(world, names) == {}
