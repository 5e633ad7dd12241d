"""Finding lost peers again. After a partition that outlasts a record's life neither side has the
other in its view, so nobody would ever dial: the swarm would stay split for good.
"""

from __future__ import annotations

from typing import Protocol

import trio

from petalnode.errors import PeerError, SwarmMismatch
from petalnode.p2p.gossip import Gossip
from petalnode.p2p.hello import ask
from petalnode.p2p.host import Host

REUNION_S = 5.0
"""Between two attempts, each at one of the lost."""
MAX_FRIENDS = 16
"""Peers that we were connected to, the latest; their addresses outlive their records here."""


class InSwarm(Protocol):
    """What this needs of ``petalnode.swarm.Swarm``."""

    network: str
    gossip: Gossip


async def seek_friends(host: Host, swarm: InSwarm) -> None:
    """Say hello to those whom we lost, in turn, and take in whom they know. Runs for ever."""
    near: dict[str, tuple[str, ...]] = {}
    away: dict[str, tuple[str, ...]] = {}  # who was near; never pushed out by those who still are
    while True:
        connected = set(host.connected_peers())
        live = {a.peer_id: a.addrs for a in swarm.gossip.view.live(trio.current_time())}
        away |= {peer_id: addrs for peer_id, addrs in near.items() if peer_id not in connected}
        near = {peer_id: addrs for peer_id, addrs in live.items() if peer_id in connected}
        away = {peer_id: addrs for peer_id, addrs in away.items() if peer_id not in connected}
        while len(away) > MAX_FRIENDS:  # who is still in view is not lost
            del away[next((peer_id for peer_id in away if peer_id in live), next(iter(away)))]
        lost = next((peer_id for peer_id in away if peer_id not in live), None)
        if lost is not None:
            away[lost] = away.pop(lost)  # the next time it is the next one's turn
            await _seek(host, swarm, lost, away[lost])
        await trio.sleep(REUNION_S)


async def _seek(host: Host, swarm: InSwarm, peer_id: str, addrs: tuple[str, ...]) -> None:
    host.learn(peer_id, addrs)
    try:
        hello = await ask(host, peer_id, network=swarm.network)
    except (PeerError, SwarmMismatch):
        return  # still away, or it belongs elsewhere now
    await swarm.gossip.absorb_snapshot(hello.records)
