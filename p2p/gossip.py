"""Announcements and suspicions over GossipSub: ours go out signed, others' come in checked.

Each network and model has a topic of its own. A record is checked before it is forwarded: size,
envelope signature, that whom it speaks for published it, how often that peer speaks, fingerprint,
clock, and that the view has no newer one. Announcements go into the view; suspicions to
``Gossip.suspicions``, and from there to whoever probes. Refusals are counted by reason in
``Gossip.refused`` (``routing.announcement.refusal_kind`` says what each was).

What is passed on is pushed, whole and at once, as long as there is little of it; beyond that it is
offered by its id once a second, many at once, and costs each node one copy. Refreshes leave half of
that budget to news: who came, moved, leaves or is said to be dead.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Protocol

import trio
from libp2p.abc import IHost
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import Service, TrioManager

from petalnode.p2p.envelope import MAX_RECORD_BYTES, seal, unseal_any
from petalnode.p2p.identity import Identity
from petalnode.p2p.pubsub import OneTopicPubsub, Passing
from petalnode.p2p.pubsub_limits import Budgets
from petalnode.p2p.translate import collapsed
from petalnode.routing.announcement import (
    Announcement,
    InvalidAnnouncement,
    check_clock,
    refusal_kind,
)
from petalnode.routing.suspicion import Heard, Suspicion, Suspicions
from petalnode.routing.view import NEWS, Outcome, Sighting, SwarmView

FLUSH_DEADLINE_S = 1.0  # for the last words, such as goodbye, to leave this machine
SWEEP_INTERVAL_S = 30.0
PEER_MESSAGES_PER_S = 2.0  # that one peer may publish, in the long run
PEER_BURST = 24.0
ABSORBED_AT_ONCE = 16  # records of a snapshot, 5 ms, before others have their turn
PUSHES_PER_S = 0.1  # messages that a node pushes, in the long run
PUSH_BURST = 32.0
MAX_BURIED = 256  # peers found dead whose accusers are remembered
_WORTH_TELLING: frozenset[Heard] = frozenset({"suspected", "known"})

WallClock = Callable[[], float]
"""Unix seconds; ``time.time`` outside of tests."""


class GossipHost(Protocol):
    """What gossip needs of a host."""

    libp2p: IHost

    def learn(self, peer_id: str, addrs: Sequence[str]) -> None:
        """Remember addresses for dialling."""


def topic_of(network: str, fingerprint: str) -> str:
    """The topic of a swarm: short, for every message and offer repeats it."""
    return f"petalnode/1/{sha256(f'{network}/{fingerprint}'.encode()).hexdigest()[:16]}"


class Gossip:
    """The records of one swarm, in and out. ``refused`` counts refusals by reason.

    ``on_suspect`` is called with the id of a peer that somebody calls dead, ``on_accused`` when it
    is this node, which should announce itself at once. Neither may block.
    """

    def __init__(
        self,
        host: GossipHost,
        identity: Identity,
        topic: str,
        fingerprint: str,
        view: SwarmView,
        wall_clock: WallClock,
        rng: Random,
    ) -> None:
        self.view = view
        self.topic = topic
        self.suspicions = Suspicions(identity.peer_id, view)
        self.on_suspect: Callable[[str], None] = lambda _peer_id: None
        self.on_accused: Callable[[], None] = lambda: None
        self._host = host
        self._identity = identity
        self._fingerprint = fingerprint
        self._wall_clock = wall_clock
        self._heard_of_us = self._seq_ahead = 0
        self._is_accused = False
        self._buried: dict[str, set[str]] = {}
        self._own_id = ID.from_string(identity.peer_id)
        self._speakers = Budgets(PEER_MESSAGES_PER_S, PEER_BURST)
        self._pushes = Budgets(PUSHES_PER_S, PUSH_BURST)
        self.pubsub = OneTopicPubsub(
            host.libp2p,
            topic,
            self._accept,
            first_seqno=int(wall_clock() * 1e6),
            max_data_bytes=MAX_RECORD_BYTES,
            rng=rng,
        )
        self.pubsub.mesh_router.is_guest = lambda peer: not self._lives(str(peer))

    @property
    def refused(self) -> Counter[str]:
        return self.pubsub.refused

    async def publish(self, announcement: Announcement) -> Announcement:
        """Sign our own record, take it into our own view, send it. Returns it when it is queued.

        Its ``seq`` is raised if peers know later ones of ours: numbers come from a clock, which may
        have been set back. Raises InvalidAnnouncement if it does not rise, or is not about us.
        """
        if announcement.seq + self._seq_ahead <= self._heard_of_us:
            self._seq_ahead = self._heard_of_us + 1 - announcement.seq
        announcement = replace(announcement, seq=announcement.seq + self._seq_ahead)
        raw = seal(self._identity, announcement)
        self.view.prove(announcement.peer_id)  # a flood must not push out ourselves
        matters = self._matters(announcement) or self._is_accused
        self._is_accused = False
        outcome = self.view.apply(announcement, trio.current_time(), raw)
        if outcome not in NEWS:
            raise InvalidAnnouncement(outcome, "our own record does not follow our last one")
        # Who leaves is not there any more to be asked for what it offered.
        passing = "push" if announcement.state == "offline" else self._pace(matters)
        await self.pubsub.publish(self.topic, raw, passing)
        return announcement

    async def accuse(self, suspicion: Suspicion) -> None:
        """Tell the swarm that we could not reach a peer. Returns when it is queued."""
        raw = seal(self._identity, suspicion)
        await self.pubsub.publish(self.topic, raw, self._pace(matters=True))

    def bury(self, peer_id: str) -> None:
        """A peer is dead: it leaves the view at once, and only a newer record brings it back."""
        if self.view.forget(peer_id):
            self._buried[peer_id] = set()
            if len(self._buried) > MAX_BURIED:
                del self._buried[next(iter(self._buried))]

    def accusers(self, peer_id: str) -> int:
        """How many others called a peer dead since we buried it."""
        return len(self._buried.get(peer_id, ()))

    def mesh_peers(self) -> set[str]:
        """The ids of those with whom messages are exchanged as they come."""
        return {str(peer_id) for peer_id in self.pubsub.mesh_router.mesh.get(self.topic, ())}

    def may_return(self, peer_id: str, now: float) -> bool:
        """Whether a peer is buried, and the record that it was buried with would still count."""
        return self.view.get(peer_id, now) is None and self.view.would_live(peer_id, now)

    def unbury(self, peer_id: str) -> bool:
        """We reached a peer that we had buried; whether it is in the view again."""
        self._buried.pop(peer_id, None)
        return self.view.revive(peer_id, trio.current_time())

    def snapshot(self) -> list[Sighting]:
        """All living records as signed, for a node that joins."""
        return self.view.snapshot(trio.current_time())

    def absorb(self, sightings: Iterable[Sighting]) -> int:
        """Take in a few records that a peer gave: checked like gossip, never forwarded.

        Returns how many were news.
        """
        outcomes = [self._take(s.raw, age_s=s.age_s) for s in sightings]
        return sum(outcome in NEWS for outcome in outcomes)

    async def absorb_snapshot(self, sightings: Sequence[Sighting]) -> int:
        """The same for a whole snapshot, while everything else goes on."""
        news = 0
        for first in range(0, len(sightings), ABSORBED_AT_ONCE):
            news += self.absorb(sightings[first : first + ABSORBED_AT_ONCE])
            await trio.lowlevel.checkpoint()
        return news

    def _accept(self, raw: bytes, publisher: str) -> Passing:
        """Whether, and how, to pass on what a peer published."""
        if not self._speakers.spend(ID.from_string(publisher)):
            self.refused["flood"] += 1
            return ""
        try:
            said = unseal_any(raw)
            if isinstance(said, Suspicion):
                return self._pace(matters=True) if self._hear(said, publisher) else ""
        except InvalidAnnouncement as error:
            self._refuse(error.reason, publisher)
            return ""
        matters = self._matters(said)
        outcome = self._admit(said, raw, publisher=publisher)
        # A duplicate came by snapshot before: those who hear of it through us still need it.
        return self._pace(matters) if outcome in NEWS or outcome == "duplicate" else ""

    def _matters(self, said: Announcement) -> bool:
        """Whether a record, not yet in the view, says more than that its peer is still there."""
        now = trio.current_time()
        known = self.view.get(said.peer_id, now)
        if known is None or self.suspicions.is_accused(said.peer_id, now):
            return True
        return _place(known) != _place(said)

    def _pace(self, matters: bool) -> Passing:
        keep = 0.0 if matters else PUSH_BURST / 2
        return "push" if self._pushes.spend(self._own_id, keep) else "offer"

    def _hear(self, said: Suspicion, publisher: str) -> bool:
        if publisher != said.accuser:
            raise InvalidAnnouncement("publisher", "another peer than the accuser published it")
        said.check_clock(self._wall_clock())
        if said.accused in self._buried and not self._lives(said.accused):
            return self._hear_of_buried(said)
        heard = self.suspicions.hear(said, trio.current_time())
        if heard == "suspected":
            self.on_suspect(said.accused)
        elif heard == "refute":
            self._is_accused = True
            self.on_accused()
        elif heard not in _WORTH_TELLING:
            self.refused[heard] += 1
        return heard in _WORTH_TELLING

    def _hear_of_buried(self, said: Suspicion) -> bool:
        """Old news to us, but maybe not to those who hear of it through us."""
        if not self._lives(said.accuser):  # keys cost nothing
            self.refused["no voice"] += 1
            return False
        accusers = self._buried[said.accused]
        is_new = said.accuser not in accusers
        accusers.add(said.accuser)
        return is_new

    def _lives(self, peer_id: str) -> bool:
        return self.view.get(peer_id, trio.current_time()) is not None

    def _take(self, raw: bytes, *, age_s: float = 0.0) -> Outcome | None:
        try:
            said = unseal_any(raw)
        except InvalidAnnouncement as error:
            self.refused[error.reason] += 1
            return None
        if isinstance(said, Suspicion):
            self.refused["malformed"] += 1
            return None
        return self._admit(said, raw, age_s=age_s)

    def _admit(
        self, announcement: Announcement, raw: bytes, *, publisher: str = "", age_s: float = 0.0
    ) -> Outcome | None:
        try:
            self._check(announcement, publisher)
        except InvalidAnnouncement as error:
            self._refuse(error.reason, publisher)
            return None
        now = trio.current_time()
        known = self.view.get(announcement.peer_id, now)
        outcome = self.view.apply(announcement, now, raw, age_s=age_s)
        if outcome in NEWS:
            if known is None or known.addrs != announcement.addrs:
                self._host.learn(announcement.peer_id, announcement.addrs)
        elif outcome != "duplicate":
            self._refuse(outcome, publisher)
        return outcome

    def _refuse(self, reason: str, publisher: str) -> None:
        self.refused[reason] += 1
        # Anybody can send old messages once more: their author must not be silenced by that.
        if publisher and refusal_kind(reason) == "replayed":
            self._speakers.refund(ID.from_string(publisher))

    def _check(self, announcement: Announcement, publisher: str) -> None:
        if publisher not in ("", announcement.peer_id):
            raise InvalidAnnouncement("publisher", "another peer than its subject published it")
        if announcement.peer_id == self._identity.peer_id:
            if announcement.seq > self._heard_of_us:
                self._heard_of_us = announcement.seq
                self._answer_echo()
            raise InvalidAnnouncement("echo", "it is about ourselves")
        if announcement.fingerprint != self._fingerprint:
            raise InvalidAnnouncement("fingerprint", "it is about another model")
        check_clock(announcement, self._wall_clock())

    def _answer_echo(self) -> None:
        """Peers know a later record of ours than we do: all that we say is old news to them."""
        own = self.view.get(self._identity.peer_id, trio.current_time())
        if own is not None and own.seq < self._heard_of_us:
            self.on_accused()

    async def _start(self, nursery: trio.Nursery) -> None:
        await _run_service(nursery, self.pubsub.mesh_router)
        await _run_service(nursery, self.pubsub)
        await self.pubsub.wait_until_ready()
        await self.pubsub.subscribe(self.topic)
        nursery.start_soon(self._meet_connected)
        nursery.start_soon(self._sweep)

    async def _meet_connected(self) -> None:
        """Open gossip streams to the peers that were connected before us."""
        connected = self._host.libp2p.get_connected_peers()
        async with trio.open_nursery() as nursery:
            for peer_id in connected:
                nursery.start_soon(self.pubsub.ensure_peer_stream, peer_id)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            self.pubsub.forget_strangers()
            here = self.view.live(trio.current_time())
            self._speakers.keep_only({ID.from_string(a.peer_id) for a in here})


@asynccontextmanager
async def open_gossip(
    host: GossipHost,
    identity: Identity,
    *,
    network: str,
    fingerprint: str,
    view: SwarmView,
    wall_clock: WallClock = time.time,
    rng: Random | None = None,
) -> AsyncIterator[Gossip]:
    """Join the topic of a swarm for as long as the context is open. ``rng`` chooses the mesh.

    On leaving, what was published gets ``FLUSH_DEADLINE_S`` to leave the machine.
    """
    topic = topic_of(network, fingerprint)
    gossip = Gossip(host, identity, topic, fingerprint, view, wall_clock, rng or Random())
    with collapsed():
        async with trio.open_nursery() as nursery:
            await gossip._start(nursery)
            try:
                yield gossip
            finally:
                with trio.move_on_after(FLUSH_DEADLINE_S) as last_words:
                    last_words.shield = True
                    await gossip.pubsub.flush()
                nursery.cancel_scope.cancel()


def _place(said: Announcement) -> tuple[object, ...]:
    return said.state, said.start, said.end, said.moving_to


async def _run_service(nursery: trio.Nursery, service: Service) -> None:
    """Run a service of libp2p's until the nursery is cancelled.

    libp2p's own way of ending one stops its tasks one after the other, in random order.
    """
    manager = TrioManager(service)
    service._manager = manager
    nursery.start_soon(manager.run)
    await manager.wait_started()
