"""A death spreads as a suspicion that the accused can refute (SWIM: Das, Gupta, Motivala, 2002).

Whoever fails to reach a peer says so: "its record number ``seq`` is that of a dead peer". A peer
that hears itself accused announces a newer record at once, which refutes every accusation of older
ones. What ``WITNESSES`` independent peers say, and nobody refutes within ``CONFIRM_S``, is taken
for true. So nobody waits for a long expiry. And nobody can slander: meanwhile the accused is only
used last, a probe of our own decides at once either way, only peers that have been in view for a
while have a voice, for few cases at a time, and those who were refuted again and again lose it.

Pure state: time is passed in (seconds of any monotonic clock). Who signed a suspicion, and that its
accuser is the signer, is the caller's to check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from petalnode.routing.announcement import (
    MAX_CLOCK_SKEW_S,
    InvalidAnnouncement,
    check_integer,
    check_number,
    check_peer_id,
)
from petalnode.routing.view import SwarmView

WITNESSES = 2
"""Independent accusers that it takes; a probe of our own counts for all of them."""
CONFIRM_S = 11.0
"""For the accused to hear of it and its refutation to arrive: gossip's way to and fro."""
LIFE_S = 60.0
"""How long an accusation counts, and how old one may be on its arrival, give or take the skew."""
TENURE_S = 20.0
"""Since when a peer must be in view to be heard: keys made a moment ago accuse nobody."""
MAX_OPEN = 8
"""Accusations of one accuser that count at the same time."""
MAX_REFUTED = 3
"""Refuted accusations within ``FADE_S`` after which an accuser is not heard."""
FADE_S = 300.0
MAX_ACCUSED = 1024
"""Peers under suspicion at the same time."""

Heard = Literal["suspected", "known", "refute", "refuted", "no voice", "stranger", "full"]


@dataclass(frozen=True)
class Suspicion:
    """``accuser`` could not reach ``accused``, whose latest record it knew was number ``seq``.

    ``issued_at`` is the accuser's wall clock, unix seconds. Raises InvalidAnnouncement.
    """

    accuser: str
    accused: str
    seq: int
    issued_at: float

    def __post_init__(self) -> None:
        check_peer_id(self.accuser)
        check_peer_id(self.accused)
        check_integer("seq", self.seq, 1, (1 << 63) - 1)
        check_number("issued_at", self.issued_at, 0.0, 1e12)
        if self.accuser == self.accused:
            raise InvalidAnnouncement("suspicion", "a peer accuses itself")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for any serializer."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, plain: object) -> Suspicion:
        """The suspicion in ``plain``, which may be anything. Raises InvalidAnnouncement."""
        names = [item.name for item in fields(cls)]
        if not isinstance(plain, Mapping) or any(name not in plain for name in names):
            raise InvalidAnnouncement("malformed", "it is not a suspicion")
        return cls(**{name: plain[name] for name in names})

    def check_clock(self, wall_now: float) -> None:
        """Refuse what is from the future or out of date. Raises InvalidAnnouncement."""
        age = wall_now - self.issued_at
        if age < -MAX_CLOCK_SKEW_S:
            raise InvalidAnnouncement("future", f"it was issued {-age:.0f} s from now")
        if age > LIFE_S + MAX_CLOCK_SKEW_S:
            raise InvalidAnnouncement("expired", f"it was issued {age:.0f} s ago")


@dataclass
class _Case:
    """What is held against one record of one peer."""

    seq: int
    opened_at: float
    accusers: set[str] = field(default_factory=set)
    seen_at: float = -math.inf  # by a probe of our own
    ours: bool = False  # a probe of our own failed


class Suspicions:
    """All open cases, as one node sees them. ``view`` says who is who."""

    def __init__(self, own_id: str, view: SwarmView) -> None:
        self._own_id = own_id
        self._view = view
        self._cases: dict[str, _Case] = {}
        self._refuted: dict[str, list[float]] = {}

    def hear(self, said: Suspicion, now: float) -> Heard:
        """Take in a suspicion that was checked.

        "suspected" and "known" are worth passing on; "suspected" is a reason to probe the accused,
        "refute" to announce ourselves as soon as may be, each time, for an accusation of our latest
        record stands until we do; the rest says why it counts for nothing.
        """
        if said.accused == self._own_id:
            own = self._view.get(self._own_id, now)
            return "refuted" if own is not None and own.seq > said.seq else "refute"
        self._settle(now)
        record = self._view.get(said.accused, now)
        if record is None:
            return "stranger"
        if record.seq > said.seq:
            return "refuted"
        if not self._has_voice(said.accuser, now):
            return "no voice"
        if said.accused not in self._cases and len(self._cases) >= MAX_ACCUSED:
            return "full"
        case = self._cases.setdefault(said.accused, _Case(record.seq, now))
        if said.accuser in case.accusers:
            if not self._has_faded(case, now):
                return "known"
            case.accusers.clear()  # it says so again: we looked before it may have died
        if self._has_faded(case, now):
            case.opened_at, case.seen_at = now, -math.inf
        case.accusers.add(said.accuser)
        return "suspected"

    def probe_failed(self, peer_id: str, wall_now: float, now: float) -> Suspicion | None:
        """We could not reach a peer. What to tell the swarm, None if it has been told enough."""
        record = self._view.get(peer_id, now)
        if record is None or peer_id == self._own_id:
            return None
        self._settle(now)
        case = self._cases.setdefault(peer_id, _Case(record.seq, now))
        case.ours, case.seen_at = True, -math.inf
        if len(case.accusers) >= WITNESSES:
            return None
        return Suspicion(self._own_id, peer_id, record.seq, wall_now)

    def probe_succeeded(self, peer_id: str, now: float) -> None:
        """We reached a peer: whatever others have said so far, for us it lives."""
        case = self._cases.get(peer_id)
        if case is not None:
            case.seen_at, case.ours = now, False

    def suspected(self, now: float) -> set[str]:
        """The peers to use last, and to probe."""
        self._settle(now)
        return {peer_id for peer_id, case in self._cases.items() if case.seen_at < case.opened_at}

    def is_accused(self, peer_id: str, now: float) -> bool:
        """Whether anybody waits for the answer of a peer, seen alive by us or not."""
        self._settle(now)
        return peer_id in self._cases

    def dead(self, now: float) -> list[str]:
        """The peers that are dead by now and are to leave the view; each is told once."""
        self._settle(now)
        found = [peer_id for peer_id, case in self._cases.items() if self._is_proven(case, now)]
        for peer_id in found:
            del self._cases[peer_id]
        return sorted(found)

    def _is_proven(self, case: _Case, now: float) -> bool:
        if case.seen_at >= case.opened_at:
            return False
        return case.ours or (len(case.accusers) >= WITNESSES and now - case.opened_at >= CONFIRM_S)

    def _has_faded(self, case: _Case, now: float) -> bool:
        """Whether we saw the accused alive, but too long ago to know better than its accusers."""
        return case.opened_at <= case.seen_at <= now - CONFIRM_S

    def _settle(self, now: float) -> None:
        """Close the cases that a newer record refuted, and those that ran out of time."""
        for peer_id, case in list(self._cases.items()):
            record = self._view.get(peer_id, now)
            if record is not None and record.seq > case.seq:
                for accuser in case.accusers:
                    self._refuted.setdefault(accuser, []).append(now)
            elif record is not None and now - case.opened_at < LIFE_S:
                continue
            del self._cases[peer_id]
        for accuser, times in list(self._refuted.items()):
            self._refuted[accuser] = [t for t in times if now - t < FADE_S]
            if not self._refuted[accuser]:
                del self._refuted[accuser]

    def _has_voice(self, accuser: str, now: float) -> bool:
        since = self._view.since(accuser, now)
        if since is None or now - since < TENURE_S:
            return False
        open_cases = sum(accuser in case.accusers for case in self._cases.values())
        return open_cases < MAX_OPEN and len(self._refuted.get(accuser, ())) < MAX_REFUTED
