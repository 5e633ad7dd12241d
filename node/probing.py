"""Who is near, and who is dead: a few connections, round trips, probes.

A broken or silent connection (``p2p.yamux`` notices within seconds) is a reason to probe its peer
at once; so are a session's failure and somebody else's suspicion. Peers that nobody is connected to
are found dead by their ring: every node that serves watches the next few peer ids after its own. A
probe that fails ends the peer here and is told to the swarm (``routing.suspicion``). What nobody
needs any more is closed (``idling``).

Task tree: ``Watch.run`` has one task that keeps the mesh, one for the ring, one that keeps time for
suspicions, and ``MAX_PROBES`` that probe; all run for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

import trio

from petalnode.errors import PeerError
from petalnode.idling import MESH_PEERS, PARTED_S, Idleness, ring
from petalnode.p2p.gossip import Gossip
from petalnode.p2p.host import Host
from petalnode.routing.announcement import Announcement
from petalnode.routing.beats import Census
from petalnode.routing.suspicion import WITNESSES

MESH_INTERVAL_S = 2.0
PROBE_INTERVAL_S = 5.0
PROBE_DEADLINE_S = 4.0
"""For connecting to a peer and measuring one round trip."""
MAX_PROBES = 8
"""Under way at the same time."""
MAX_DUE = 256
"""Probes that wait their turn; more are dropped, for somebody else to do."""
ASKED_PROBES = 16
"""How many peers of a large swarm look for themselves when they hear a suspicion."""
TELL_SPREAD_S = 0.5
"""Those who find a peer dead together do not all say so."""
UNREACHABLE_S = 10.0
"""A peer that we failed to reach and that is alive for others is left alone for so long at first,
each time for twice as long."""
MAX_UNREACHABLE_S = 600.0
FEW_PEERS = 2
"""Whoever is connected to fewer dials those again that had enough of it."""
CUT_OFF_PEERS = 4
"""Whoever loses all of so many connections is itself cut off, and blames nobody."""
TICK_S = 1.0
DOUBT_S = 5.0
"""How often a client looks again at those that it alone takes for dead."""
MAX_DOUBTED = 64
MAX_KNOWN = 1024
"""Peers about whom something is remembered; the oldest makes room."""


class Watch:
    """One node's eye on its swarm. ``own_record`` is what it announced last, None for a client."""

    def __init__(
        self,
        host: Host,
        gossip: Gossip,
        own_record: Callable[[], Announcement | None],
        census: Census,
        rng: Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._host = host
        self._gossip = gossip
        self._view = gossip.view
        self._own_record = own_record
        self._census = census
        self._rng = rng
        self._wall_clock = wall_clock
        self._rtts: dict[str, float] = {}
        self._unreachable: dict[str, tuple[float, float]] = {}  # until when, and for how long
        self._parted: dict[str, float] = {}  # until when, after a goodbye of either side
        self._to_measure: set[str] = set()
        self._idleness = Idleness()
        self._due, self._to_probe = trio.open_memory_channel[str](MAX_DUE)
        self._in_line: set[str] = set()
        self._drawn: set[str] = set()  # of those in line, the strangers met by chance
        self._doubted: dict[str, Announcement] = {}
        host.on_disconnect(self.check, goodbye=False)
        host.on_disconnect(self._part, goodbye=True)
        gossip.on_suspect = self._look_for_ourselves

    def rtts(self) -> Mapping[str, float]:
        """Measured round trips in seconds; this node is no distance from itself."""
        for peer_id in self._host.connected_peers():
            self._remember(peer_id, self._host.rtt_s(peer_id))
        return {**self._rtts, self._host.peer_id: 0.0}

    def measure_too(self, peer_ids: Iterable[str]) -> None:
        """Measure the way to these peers once: their round trips are to be announced."""
        self._to_measure = set(peer_ids)

    def check(self, peer_id: str) -> None:
        """Probe a peer of the swarm as soon as may be. Does not block."""
        if peer_id in self._in_line or peer_id == self._host.peer_id:
            return
        if self._record(peer_id) is None:
            return
        try:
            self._due.send_nowait(peer_id)
        except trio.WouldBlock:
            return  # a flood: others look too
        self._in_line.add(peer_id)

    async def measure(self, records: Iterable[Announcement], deadline_s: float) -> None:
        """Measure the way to some peers, all at once, for at most ``deadline_s``."""
        with trio.move_on_after(deadline_s):
            async with trio.open_nursery() as nursery:
                for record in records:
                    nursery.start_soon(self._reach, record)

    async def run(self) -> None:
        """Runs for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_mesh)
            nursery.start_soon(self._keep_ring)
            nursery.start_soon(self._bury_dead)
            nursery.start_soon(self._look_again)
            for _ in range(MAX_PROBES):
                nursery.start_soon(self._probe_due)

    async def _keep_mesh(self) -> None:
        while True:
            self._view.expire(trio.current_time())
            connected = set(self._host.connected_peers())
            self.rtts()  # whom we have met
            self._close_idle(connected)
            self._to_measure -= connected
            others = self._others()
            apart = [a for a in others if a.peer_id not in connected]
            near = len(others) - len(apart)
            lacking = max(0, MESH_PEERS - near)
            if near < FEW_PEERS:
                self._parted.clear()
            apart = [a for a in apart if self._may_dial(a.peer_id)]
            missed = [a.peer_id for a in apart if a.peer_id in self._to_measure]
            drawn = [a.peer_id for a in self._rng.sample(apart, min(lacking, len(apart)))]
            for peer_id in dict.fromkeys(missed + drawn):
                self._draw(peer_id)
            await trio.sleep(MESH_INTERVAL_S)

    def _close_idle(self, connected: set[str]) -> None:
        in_use = {peer_id for peer_id in connected if self._host.is_in_use(peer_id)}
        watched, watchers = self._ring()
        kept = {*watched, *watchers, *self._gossip.mesh_peers(), *self._in_line}
        guests = {peer_id for peer_id in connected if self._record(peer_id) is None}
        now = trio.current_time()
        for peer_id in self._idleness.surplus(connected, in_use, kept, guests, now):
            self._host.close_peer(peer_id)

    def _part(self, peer_id: str) -> None:
        """One of us closed the connection: the peer is alive, or has said that it leaves."""
        self._parted.pop(peer_id, None)
        self._parted[peer_id] = trio.current_time() + PARTED_S
        if len(self._parted) > MAX_KNOWN:
            del self._parted[next(iter(self._parted))]

    async def _keep_ring(self) -> None:
        while True:
            await trio.sleep(PROBE_INTERVAL_S * self._rng.uniform(0.9, 1.1))
            connected = set(self._host.connected_peers())
            watched, _ = self._ring()
            for peer_id in watched:
                if peer_id not in connected and self._may_dial(peer_id):
                    self._draw(peer_id)

    def _draw(self, peer_id: str) -> None:
        is_stranger = peer_id not in self._in_line and not self._has_met(peer_id)
        self.check(peer_id)
        if is_stranger and peer_id in self._in_line:
            self._drawn.add(peer_id)

    async def _bury_dead(self) -> None:
        """Those whom others found dead, once it is certain."""
        while True:
            await trio.sleep(TICK_S)
            for peer_id in self._gossip.suspicions.dead(trio.current_time()):
                self._gossip.bury(peer_id)

    async def _probe_due(self) -> None:
        async for peer_id in self._to_probe:
            try:
                record = self._record(peer_id)
                if record is not None:
                    await self._probe(record)
            finally:
                self._in_line.discard(peer_id)
                self._drawn.discard(peer_id)

    async def _probe(self, record: Announcement) -> None:
        had_met = self._has_met(record.peer_id)
        reached = await self._reach(record)
        now = trio.current_time()
        if record.peer_id in self._drawn:
            self._census.note(reached)
        if reached:
            self._gossip.suspicions.probe_succeeded(record.peer_id, now)
            return
        known = self._record(record.peer_id)
        if known is None or known.seq > record.seq or self._is_cut_off():
            return  # it left, it spoke meanwhile, or we are the one who is gone
        self._leave_alone(record.peer_id, now)
        suspicion = self._gossip.suspicions.probe_failed(record.peer_id, self._wall_clock(), now)
        for peer_id in self._gossip.suspicions.dead(now):
            self._gossip.bury(peer_id)
        if self._own_record() is None:
            self._doubt(record)
            return  # the swarm would not listen to one who serves nothing
        if suspicion is None or not had_met:
            return  # the swarm knows; or it may be us who cannot reach it, and never could
        await trio.sleep(self._rng.uniform(0, TELL_SPREAD_S))
        if self._gossip.accusers(record.peer_id) < WITNESSES:
            await self._gossip.accuse(suspicion)

    def _has_met(self, peer_id: str) -> bool:
        """Whether there was ever a connection, whoever made it."""
        return peer_id in self._rtts or self._view.is_proven(peer_id)

    def _doubt(self, record: Announcement) -> None:
        """We told nobody that a peer is dead, so nobody refutes it: look again ourselves."""
        self._doubted[record.peer_id] = record
        if len(self._doubted) > MAX_DOUBTED:
            del self._doubted[next(iter(self._doubted))]

    async def _look_again(self) -> None:
        while True:
            await trio.sleep(DOUBT_S)
            now = trio.current_time()
            gone = [p for p in self._doubted if not self._gossip.may_return(p, now)]
            for peer_id in gone:
                del self._doubted[peer_id]
            async with trio.open_nursery() as nursery:
                for record in list(self._doubted.values())[:MAX_PROBES]:
                    nursery.start_soon(self._look_again_at, record)

    async def _look_again_at(self, record: Announcement) -> None:
        self._doubted.pop(record.peer_id, None)
        if await self._reach(record):
            self._gossip.unbury(record.peer_id)
        else:
            self._doubt(record)  # behind the others

    async def _reach(self, record: Announcement) -> bool:
        self._host.learn(record.peer_id, record.addrs)
        try:
            with trio.fail_after(PROBE_DEADLINE_S):
                self._remember(record.peer_id, await self._host.ping(record.peer_id))
        except (PeerError, trio.TooSlowError):
            return False
        self._unreachable.pop(record.peer_id, None)
        self._view.prove(record.peer_id)
        return True

    def _look_for_ourselves(self, peer_id: str) -> None:
        """Somebody calls a peer dead: in a large swarm only some of us go and see."""
        near = peer_id in self._host.connected_peers()
        share = 1.0 if near else ASKED_PROBES / max(1, len(self._others()))
        if self._may_dial(peer_id) and self._rng.random() < share:
            self.check(peer_id)

    def _may_dial(self, peer_id: str) -> bool:
        """Not a peer that is alive although we cannot reach it, nor one that had enough of us."""
        until, _ = self._unreachable.get(peer_id, (0.0, 0.0))
        return trio.current_time() >= max(until, self._parted.get(peer_id, 0.0))

    def _leave_alone(self, peer_id: str, now: float) -> None:
        _, pause_s = self._unreachable.pop(peer_id, (0.0, UNREACHABLE_S / 2))
        pause_s = min(2 * pause_s, MAX_UNREACHABLE_S)
        self._unreachable[peer_id] = now + pause_s, pause_s
        if len(self._unreachable) > MAX_KNOWN:
            del self._unreachable[next(iter(self._unreachable))]

    def _is_cut_off(self) -> bool:
        return not self._host.connected_peers() and len(self._others()) >= CUT_OFF_PEERS

    def _ring(self) -> tuple[Sequence[str], Sequence[str]]:
        """Whom we watch and who watches us; a client, which nobody can hear, watches nobody."""
        if self._own_record() is None:
            return (), ()
        return ring(self._host.peer_id, (a.peer_id for a in self._others()))

    def _others(self) -> list[Announcement]:
        live = self._view.live(trio.current_time())
        return [a for a in live if a.peer_id != self._host.peer_id]

    def _record(self, peer_id: str) -> Announcement | None:
        return self._view.get(peer_id, trio.current_time())

    def _remember(self, peer_id: str, rtt_s: float | None) -> None:
        if rtt_s is None:
            return
        self._rtts.pop(peer_id, None)
        self._rtts[peer_id] = rtt_s
        if len(self._rtts) > MAX_KNOWN:
            del self._rtts[next(iter(self._rtts))]
