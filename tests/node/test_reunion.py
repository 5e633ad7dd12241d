"""Who is looked for after a partition, on a virtual clock."""

from types import SimpleNamespace

import trio

from petalnode.errors import PeerUnreachable
from petalnode.reunion import MAX_FRIENDS, REUNION_S, seek_friends
from petalnode.routing.view import SwarmView

from ..routing.records import record

KEPT = [f"kept{number:02}" for number in range(2 * MAX_FRIENDS)]
LOST = [f"lost{number:02}" for number in range(4)]


class FakeHost:
    """Connected to whom it is told; reaches nobody else."""

    def __init__(self, connected):
        self.connected = connected
        self.sought = []

    def connected_peers(self):
        return self.connected

    def learn(self, peer_id, addrs):
        assert addrs

    async def open_stream(self, peer_id, protocol):
        self.sought.append(peer_id)
        raise PeerUnreachable("It is away.", "Wait.", peer_id)


async def test_those_who_stayed_do_not_make_us_forget_those_who_are_lost(autojump_clock):
    """Connections break long before records expire in a large swarm."""
    view, host = SwarmView(), FakeHost([*KEPT, *LOST])
    for peer_id in (*KEPT, *LOST):
        ttl_s = 30 * REUNION_S if peer_id in LOST else 1e4
        view.apply(record(peer_id, ttl_s=ttl_s), trio.current_time(), b"")
    swarm = SimpleNamespace(network="home", gossip=SimpleNamespace(view=view))
    with trio.move_on_after(40 * REUNION_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(seek_friends, host, swarm)
            await trio.sleep(3.5 * REUNION_S)
            host.connected = KEPT
            await trio.sleep(20 * REUNION_S)
            assert not host.sought  # they are still in view: that is for others to probe
            await trio.sleep_forever()
    assert host.sought[:8] == LOST + LOST


async def test_those_whom_we_only_parted_from_do_not_either(autojump_clock):
    """Idle connections are closed; their peers are still in view, and nobody need look for them."""
    view, host = SwarmView(), FakeHost([*KEPT, *LOST])
    for peer_id in (*KEPT, *LOST):
        ttl_s = 2 * REUNION_S if peer_id in LOST else 1e4
        view.apply(record(peer_id, ttl_s=ttl_s), trio.current_time(), b"")
    swarm = SimpleNamespace(network="home", gossip=SimpleNamespace(view=view))
    with trio.move_on_after(40 * REUNION_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(seek_friends, host, swarm)
            await trio.sleep(1.5 * REUNION_S)
            host.connected = KEPT
            await trio.sleep(REUNION_S)
            host.connected = []
            await trio.sleep_forever()
    assert host.sought[:8] == LOST + LOST
