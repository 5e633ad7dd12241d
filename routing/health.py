"""Which peers to leave alone for a while. Pure state: time is passed in, seconds of any one clock.

A peer that failed is banned at once, for a time that doubles with each failure in a row. A strike
fades for every five quiet minutes after the ban, and one success forgives them all. Who refuses
("busy"), and whatever goes wrong on our own side, is never punished: blame is in the error's type.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalnode.errors import PeerError, PeerGone, PeerMisbehaved, PeerUnreachable

BAN_S = 5.0
"""The first ban; each further one is twice as long."""
MAX_BAN_S = 600.0
FADE_S = 300.0
"""A strike fades for each such time after the ban's end."""
MAX_PEERS = 4096
"""Peers remembered; the one whose ban ended first makes room."""

_WHY = {
    PeerUnreachable: "it could not be reached",
    PeerGone: "its connection was lost",
    PeerMisbehaved: "it broke the protocol",
}


@dataclass
class _Ban:
    strikes: int
    until: float
    why: str


class PeerHealth:
    """Bans by peer id."""

    def __init__(self) -> None:
        self._bans: dict[str, _Ban] = {}

    def note(self, error: BaseException, now: float) -> bool:
        """Judge what went wrong; whether a peer was banned for it."""
        if not isinstance(error, PeerError) or not error.peer_id:
            return False
        for kind, why in _WHY.items():
            if isinstance(error, kind):
                self.failed(error.peer_id, now, why)
                return True
        return False

    def failed(self, peer_id: str, now: float, why: str) -> None:
        """Ban a peer. Further failures while it is banned are the same failure."""
        ban = self._bans.pop(peer_id, None) or _Ban(0, now, why)
        if now >= ban.until:
            strikes = self._faded(ban, now) + 1
            ban = _Ban(strikes, now + min(BAN_S * 2 ** (strikes - 1), MAX_BAN_S), why)
        self._bans[peer_id] = ban
        if len(self._bans) > MAX_PEERS:
            del self._bans[min(self._bans, key=lambda p: self._bans[p].until)]

    def succeeded(self, peer_id: str) -> None:
        """The peer did what it was asked: everything is forgiven."""
        self._bans.pop(peer_id, None)

    def released(self, peer_id: str, now: float) -> None:
        """Nobody else is left to ask: the ban ends now. Its strikes stay, so that the next one is
        longer still."""
        if peer_id in self._bans:
            ban = self._bans[peer_id]
            ban.until = min(ban.until, now)

    def banned(self, now: float) -> dict[str, str]:
        """The peers to leave out, each with the words for why."""
        self._forget(now)
        return {
            peer_id: f"banned for {max(1, round(ban.until - now))} s more: {ban.why}"
            for peer_id, ban in self._bans.items()
            if now < ban.until
        }

    def strikes(self, peer_id: str, now: float) -> int:
        """How many failures in a row still count."""
        ban = self._bans.get(peer_id)
        return 0 if ban is None else self._faded(ban, now)

    def _faded(self, ban: _Ban, now: float) -> int:
        return max(0, ban.strikes - int(max(0.0, now - ban.until) / FADE_S))

    def _forget(self, now: float) -> None:
        for peer_id in [p for p, ban in self._bans.items() if self._faded(ban, now) == 0]:
            del self._bans[peer_id]
