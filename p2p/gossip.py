"""Announcements over GossipSub: ours go out signed, others' come in checked, then into the view.

Topic ``petalnode/1/<network>/<fingerprint>``. A record is checked before it is forwarded: size,
envelope signature, that its subject published it, fingerprint, clock, and that the view has no
newer one. Refusals are counted by reason in ``Gossip.refused``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio
from libp2p.abc import IHost
from libp2p.tools.anyio_service import background_trio_service

from petalnode.p2p.envelope import MAX_RECORD_BYTES, seal, unseal
from petalnode.p2p.identity import Identity
from petalnode.p2p.pubsub import OneTopicPubsub
from petalnode.p2p.translate import collapsed
from petalnode.routing.announcement import Announcement, InvalidAnnouncement, check_clock
from petalnode.routing.view import NEWS, Outcome, Sighting, SwarmView

FLUSH_DEADLINE_S = 1.0  # for the last words, such as goodbye, to leave this machine
SWEEP_INTERVAL_S = 30.0

WallClock = Callable[[], float]
"""Unix seconds; ``time.time`` outside of tests."""


class GossipHost(Protocol):
    """What gossip needs of a host."""

    libp2p: IHost

    def learn(self, peer_id: str, addrs: Sequence[str]) -> None:
        """Remember addresses for dialling."""


def topic_of(network: str, fingerprint: str) -> str:
    return f"petalnode/1/{network}/{fingerprint}"


class Gossip:
    """The records of one swarm, in and out. ``refused`` counts refusals by reason."""

    def __init__(
        self,
        host: GossipHost,
        identity: Identity,
        topic: str,
        fingerprint: str,
        view: SwarmView,
        wall_clock: WallClock,
    ) -> None:
        self.view = view
        self.topic = topic
        self._host = host
        self._identity = identity
        self._fingerprint = fingerprint
        self._wall_clock = wall_clock
        self.pubsub = OneTopicPubsub(
            host.libp2p,
            topic,
            self._accept,
            first_seqno=int(wall_clock() * 1e6),
            max_data_bytes=MAX_RECORD_BYTES,
        )

    @property
    def refused(self) -> Counter[str]:
        return self.pubsub.refused

    async def publish(self, announcement: Announcement) -> None:
        """Sign our own record, take it into our own view, send it. Returns when it is queued.

        Raises InvalidAnnouncement if its ``seq`` does not rise, or the record is not ours.
        """
        raw = seal(self._identity, announcement)
        outcome = self.view.apply(announcement, trio.current_time(), raw)
        if outcome not in NEWS:
            raise InvalidAnnouncement(outcome, "our own record does not follow our last one")
        await self.pubsub.publish(self.topic, raw)

    def snapshot(self) -> list[Sighting]:
        """All living records as signed, for a node that joins."""
        return self.view.snapshot(trio.current_time())

    def absorb(self, sightings: Iterable[Sighting]) -> int:
        """Take in a snapshot that a contact gave: checked like gossip, never forwarded.

        Returns how many records were news.
        """
        outcomes = [self._take(s.raw, age_s=s.age_s) for s in sightings]
        return sum(outcome in NEWS for outcome in outcomes)

    def _accept(self, raw: bytes, publisher: str) -> bool:
        # A duplicate came by snapshot before: those who hear of it through us still need it.
        outcome = self._take(raw, publisher=publisher)
        return outcome in NEWS or outcome == "duplicate"

    def _take(self, raw: bytes, *, publisher: str = "", age_s: float = 0.0) -> Outcome | None:
        try:
            announcement = unseal(raw)
            self._check(announcement, publisher)
        except InvalidAnnouncement as error:
            self.refused[error.reason] += 1
            return None
        now = trio.current_time()
        known = self.view.get(announcement.peer_id, now)
        outcome = self.view.apply(announcement, now, raw, age_s=age_s)
        if outcome in NEWS:
            if known is None or known.addrs != announcement.addrs:
                self._host.learn(announcement.peer_id, announcement.addrs)
        elif outcome != "duplicate":
            self.refused[outcome] += 1
        return outcome

    def _check(self, announcement: Announcement, publisher: str) -> None:
        if publisher not in ("", announcement.peer_id):
            raise InvalidAnnouncement("publisher", "another peer than its subject published it")
        if announcement.peer_id == self._identity.peer_id:
            raise InvalidAnnouncement("echo", "it is about ourselves")
        if announcement.fingerprint != self._fingerprint:
            raise InvalidAnnouncement("fingerprint", "it is about another model")
        check_clock(announcement, self._wall_clock())

    async def _meet_connected(self) -> None:
        """Open gossip streams to the peers that were connected before us."""
        connected = self._host.libp2p.get_connected_peers()
        async with trio.open_nursery() as nursery:
            for peer_id in connected:
                nursery.start_soon(self.pubsub.ensure_peer_stream, peer_id)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            self.pubsub.drop_budgets_of_strangers()


@asynccontextmanager
async def open_gossip(
    host: GossipHost,
    identity: Identity,
    *,
    network: str,
    fingerprint: str,
    view: SwarmView,
    wall_clock: WallClock = time.time,
) -> AsyncIterator[Gossip]:
    """Join the topic of a swarm for as long as the context is open.

    On leaving, what was published gets ``FLUSH_DEADLINE_S`` to leave the machine.
    """
    topic = topic_of(network, fingerprint)
    gossip = Gossip(host, identity, topic, fingerprint, view, wall_clock)
    pubsub = gossip.pubsub
    try:
        with collapsed():
            async with (
                background_trio_service(pubsub.mesh_router),
                background_trio_service(pubsub),
                trio.open_nursery() as nursery,
            ):
                await pubsub.wait_until_ready()
                await pubsub.subscribe(topic)
                nursery.start_soon(gossip._meet_connected)
                nursery.start_soon(gossip._sweep)
                try:
                    yield gossip
                finally:
                    with trio.move_on_after(FLUSH_DEADLINE_S) as last_words:
                        last_words.shield = True
                        await pubsub.flush()
                    nursery.cancel_scope.cancel()
    finally:
        pubsub.seen_messages.stop()  # a thread
