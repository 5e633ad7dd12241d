"""What a node knows of its swarm and tells it: view, mesh, round trips, its own announcement.

Task tree: ``keep_mesh`` and ``beat`` run in the node's nursery; the gossip transport has its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager

import trio

from petalnode.errors import NoRoute, PeerError, PeerGone, PeerUnreachable
from petalnode.events import Report, Waiting
from petalnode.joining import Joined, public_name
from petalnode.models.checkpoint import Checkpoint
from petalnode.p2p.gossip import Gossip, open_gossip
from petalnode.p2p.hello import HELLO_PROTOCOL, About, hello_handler
from petalnode.p2p.host import Host
from petalnode.p2p.identity import Identity
from petalnode.routing.announcement import Announcement
from petalnode.routing.chain import Hop, choose_chain
from petalnode.routing.view import SwarmView

BEAT_S = 4.0
"""Between two announcements of a node whose state does not change."""
TTL_S = 3 * BEAT_S
"""A node that misses three beats is gone."""
MESH_PEERS = 8
"""Connections that a node keeps open for gossip and measuring; sessions open more."""
MESH_INTERVAL_S = 2.0
PROBE_DEADLINE_S = 2.0
"""For connecting to a peer and measuring one round trip before a chain is chosen."""
MAX_PROBES = 32
WAIT_FOR_BLOCKS_S = 20.0
"""How long a session waits for blocks that nobody serves."""


class Swarm:
    """One node's part in its swarm. Made by ``open_swarm``."""

    def __init__(self, network: str, num_blocks: int, host: Host, gossip: Gossip) -> None:
        self.network = network
        self.view = view = gossip.view
        self._num_blocks = num_blocks
        self._host = host
        self._gossip = gossip
        self._changed = trio.Event()
        view.on_change = self._wake

    def live(self) -> list[Announcement]:
        """What is announced and not expired."""
        return self.view.live(trio.current_time())

    def others(self) -> list[Announcement]:
        """The same without this node."""
        return [a for a in self.live() if a.peer_id != self._host.peer_id]

    def rtts(self) -> Mapping[str, float]:
        """Measured round trips in seconds; this node is no distance from itself."""
        measured = {a.peer_id: self._host.rtt_s(a.peer_id) for a in self.others()}
        known = {peer_id: rtt for peer_id, rtt in measured.items() if rtt is not None}
        return {**known, self._host.peer_id: 0.0}

    async def wait_covered(self, report: Report) -> None:
        """Until every block is served, with a reason while waiting.

        Raises ``NoRoute``, naming the blocks, after ``WAIT_FOR_BLOCKS_S``.
        """
        told: tuple[int, ...] = ()
        until = trio.current_time() + WAIT_FOR_BLOCKS_S
        while True:
            changed = self._changed
            try:
                choose_chain(self.live(), self._num_blocks, rtts={})
                return
            except NoRoute as no_route:
                left = until - trio.current_time()
                if left <= 0:
                    waited = f"{no_route.cause} Waited {WAIT_FOR_BLOCKS_S:.0f} s for them."
                    raise NoRoute(waited, no_route.remedy, no_route.missing) from None
                if no_route.missing != told:
                    told = no_route.missing
                    report(Waiting(no_route.cause, left))
            with trio.move_on_after(left):
                await changed.wait()

    async def wait_changed(self) -> None:
        """Until the view changes."""
        await self._changed.wait()

    def find_chain(self, exclude: Collection[str] = ()) -> tuple[Hop, ...]:
        """The best chain there is now, without the peers in ``exclude``. Raises ``NoRoute``."""
        return choose_chain(self.live(), self._num_blocks, rtts=self.rtts(), exclude=exclude)

    def note_failure(self, error: PeerError) -> None:
        """A peer that is gone leaves the view at once; a refusal says nothing against it."""
        if isinstance(error, PeerGone | PeerUnreachable):
            self.view.forget(error.peer_id)

    async def probe(self) -> None:
        """Connect to the peers whose distance is unknown and measure it, all at once."""
        known = self.rtts()
        unknown = [a for a in self.others() if a.peer_id not in known]
        with trio.move_on_after(PROBE_DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for announcement in unknown[:MAX_PROBES]:
                    nursery.start_soon(self._measure, announcement)

    async def _measure(self, announcement: Announcement) -> None:
        try:
            self._host.learn(announcement.peer_id, announcement.addrs)
            await self._host.ping(announcement.peer_id)
        except PeerError:
            return  # stays unmeasured, which routing takes for far

    async def keep_mesh(self) -> None:
        """Drop what expired, and stay connected to a few peers. Runs for ever."""
        while True:
            now = trio.current_time()
            self.view.expire(now)
            connected = set(self._host.connected_peers())
            wanted = [a for a in self.others() if a.peer_id not in connected]
            for announcement in wanted[: max(0, MESH_PEERS - len(connected))]:
                with trio.move_on_after(PROBE_DEADLINE_S):
                    await self._measure(announcement)
            await trio.sleep(MESH_INTERVAL_S)

    async def beat(self, announce: Callable[[], Announcement]) -> None:
        """Publish what ``announce`` says, again and again. Runs for ever."""
        while True:
            await self.publish(announce())
            await trio.sleep(BEAT_S)

    async def publish(self, announcement: Announcement) -> None:
        """Tell the swarm at once."""
        await self._gossip.publish(announcement)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


@asynccontextmanager
async def open_swarm(
    host: Host, identity: Identity, checkpoint: Checkpoint, joined: Joined
) -> AsyncIterator[Swarm]:
    """Take part in gossip, starting from what a contact knew, and answer those who say hello."""
    num_blocks = checkpoint.config.num_blocks
    async with open_gossip(
        host,
        identity,
        network=joined.network,
        fingerprint=checkpoint.fingerprint,
        view=SwarmView(num_blocks),
    ) as gossip:
        gossip.absorb(joined.records)
        about = About(joined.network, public_name(checkpoint), checkpoint.fingerprint, num_blocks)
        host.serve(HELLO_PROTOCOL, hello_handler(about, gossip.snapshot, gossip.absorb))
        yield Swarm(joined.network, num_blocks, host, gossip)
