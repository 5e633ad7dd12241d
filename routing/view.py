"""What one node believes about its swarm: the latest record of each peer, and when it dies.

Pure state: time is passed in (seconds of any monotonic clock), nothing waits. The caller has
checked signature and clock of each record. A record lives for its ``ttl_s`` after it was received;
remote clocks never decide that. A peer that is no longer alive leaves a tombstone (its last
``seq``) until every record it could be replayed with has gone out of date, so that neither a
goodbye nor an expiry can be undone by an old record.

The view is bounded. Keys cost nothing, so a flood of peers that do not exist must not push out
those that do: a peer that this node reached itself (``prove``) gives way to nobody, and of the
others a newcomer takes the place of one of the younger half.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from petalnode.routing.announcement import MAX_CLOCK_SKEW_S, Announcement

MAX_PEERS = 16_384

Outcome = Literal["new", "updated", "goodbye", "duplicate", "stale", "expired", "span", "full"]
NEWS: frozenset[Outcome] = frozenset({"new", "updated", "goodbye"})


class Sighting(NamedTuple):
    """A signed record as it arrived, and how many seconds ago that was."""

    raw: bytes
    age_s: float


@dataclass
class _Entry:
    announcement: Announcement
    raw: bytes
    received_at: float
    alive: bool
    since: float

    @property
    def expires_at(self) -> float:
        return self.received_at + self.announcement.ttl_s

    @property
    def forgotten_at(self) -> float:
        """From here on ``check_clock`` refuses the record by itself, whatever the skew was."""
        return self.expires_at + 2 * MAX_CLOCK_SKEW_S


class SwarmView:
    """The peers of one swarm. ``num_blocks`` may be set once the model is known.

    ``version`` grows, and ``on_change`` is called, whenever ``live()`` may answer differently.
    """

    def __init__(
        self,
        num_blocks: int | None = None,
        *,
        max_peers: int = MAX_PEERS,
        rng: random.Random | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.version = 0
        self.on_change: Callable[[], None] = _nothing
        self._max_peers = max_peers
        self._rng = rng or random.Random()
        self._entries: dict[str, _Entry] = {}  # who came first is first
        self._proven: set[str] = set()

    def apply(
        self, announcement: Announcement, now: float, raw: bytes, *, age_s: float = 0.0
    ) -> Outcome:
        """Take in a checked record. ``age_s``: how long ago whoever passed it on had received it.

        "new", "updated" and "goodbye" changed the view; the rest says why it did not.
        """
        known = self._entries.get(announcement.peer_id)
        alive = announcement.state != "offline"
        since = known.since if known is not None and known.alive else now
        entry = _Entry(announcement, raw, now - max(age_s, 0.0), alive, since)
        if known is not None and announcement.seq <= known.announcement.seq:
            return "duplicate" if raw == known.raw else "stale"
        if self.num_blocks is not None and _last_block(announcement) > self.num_blocks:
            return "span"
        if entry.expires_at <= now:
            return "expired"
        if known is None and not self._make_room(now):
            return "full"
        self._entries[announcement.peer_id] = entry
        self._changed()
        if not entry.alive:
            return "goodbye"
        return "updated" if known is not None and known.alive else "new"

    def live(self, now: float) -> list[Announcement]:
        """The records of all living peers, in order of their ids."""
        return [entry.announcement for _, entry in sorted(self._living(now))]

    def get(self, peer_id: str, now: float) -> Announcement | None:
        entry = self._entries.get(peer_id)
        if entry is None or not entry.alive or entry.expires_at <= now:
            return None
        return entry.announcement

    def snapshot(self, now: float) -> list[Sighting]:
        """Everything alive, as signed, freshest first: what a joining node is given."""
        entries = sorted(self._living(now), key=lambda item: (-item[1].received_at, item[0]))
        return [Sighting(entry.raw, now - entry.received_at) for _, entry in entries]

    def since(self, peer_id: str, now: float) -> float | None:
        """When a living peer came into view, None if it is not there."""
        return self._entries[peer_id].since if self.get(peer_id, now) is not None else None

    def prove(self, peer_id: str) -> None:
        """This node reached the peer, or is it: it exists, and keeps its place in a full view."""
        if len(self._proven) < self._max_peers:
            self._proven.add(peer_id)

    def is_proven(self, peer_id: str) -> bool:
        """Whether this node has reached the peer, as long as it is remembered."""
        return peer_id in self._proven

    def revive(self, peer_id: str, now: float) -> bool:
        """A peer that was forgotten is alive after all: whether its last record still counts."""
        if not self.would_live(peer_id, now):
            return False
        if not self._entries[peer_id].alive:
            self._entries[peer_id].alive = True
            self._changed()
        return True

    def would_live(self, peer_id: str, now: float) -> bool:
        """Whether the last record of a peer, forgotten or not, is neither goodbye nor expired."""
        entry = self._entries.get(peer_id)
        return (
            entry is not None and entry.announcement.state != "offline" and entry.expires_at > now
        )

    def forget(self, peer_id: str) -> bool:
        """Drop a peer that was found dead. Only a newer record of its own brings it back."""
        entry = self._entries.get(peer_id)
        if entry is None or not entry.alive:
            return False
        entry.alive = False
        self._changed()
        return True

    def expire(self, now: float) -> list[str]:
        """Drop what has outlived its time; the ids of the peers that died of it."""
        dead = [
            peer_id
            for peer_id, entry in self._entries.items()
            if entry.alive and entry.expires_at <= now
        ]
        for peer_id in dead:
            self._entries[peer_id].alive = False
        self._bury(now)
        if dead:
            self._changed()
        return sorted(dead)

    def coverage(self, now: float) -> list[int]:
        """How many online peers serve each block; empty while ``num_blocks`` is unknown."""
        counts = [0] * (self.num_blocks or 0)
        for announcement in self.live(now):
            if announcement.state == "online":
                for block in range(announcement.start, min(announcement.end, len(counts))):
                    counts[block] += 1
        return counts

    def missing(self, now: float) -> tuple[int, ...]:
        """The blocks that no online peer serves."""
        return tuple(block for block, count in enumerate(self.coverage(now)) if count == 0)

    def _living(self, now: float) -> list[tuple[str, _Entry]]:
        return [
            (peer_id, entry)
            for peer_id, entry in self._entries.items()
            if entry.alive and entry.expires_at > now
        ]

    def _make_room(self, now: float) -> bool:
        if len(self._entries) < self._max_peers:
            return True
        self._bury(now)
        if len(self._entries) < self._max_peers:
            return True
        # A living peer is worth more than the memory of a dead one.
        tombs = [(e.forgotten_at, peer_id) for peer_id, e in self._entries.items() if not e.alive]
        if tombs:
            self._drop(min(tombs)[1])
            return True
        return self._evict()

    def _evict(self) -> bool:
        """Make room at the cost of one of the younger peers that this node never reached."""
        unproven = len(self._entries) - len(self._proven & self._entries.keys())
        if unproven == 0:
            return False
        younger = (p for p in reversed(self._entries) if p not in self._proven)
        chosen = self._rng.randrange((unproven + 1) // 2)
        self._drop(next(itertools.islice(younger, chosen, None)))
        return True

    def _bury(self, now: float) -> None:
        for peer_id in [p for p, entry in self._entries.items() if entry.forgotten_at <= now]:
            self._drop(peer_id)

    def _drop(self, peer_id: str) -> None:
        del self._entries[peer_id]
        self._proven.discard(peer_id)

    def _changed(self) -> None:
        self.version += 1
        self.on_change()


def _last_block(a: Announcement) -> int:
    return a.end if a.moving_to is None else max(a.end, a.moving_to[1])


def _nothing() -> None:
    """Nobody listens yet."""
