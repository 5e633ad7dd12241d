"""Whom a session does not ask for a while: peers that it lost, or that refused it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

import trio

from petalnode.errors import PeerError

AVOID_S = 2.0
"""The first time; each further time that the same peer fails, it is twice as long."""
MAX_AVOID_S = 30.0
"""At most, and for how long after it a peer's failures are remembered."""


@dataclass(frozen=True)
class _Entry:
    until: float
    for_s: float
    error: PeerError


class Avoided(Mapping[str, PeerError]):
    """Peer ids with what they failed at. Entries run out by themselves, so that who waits for a
    replacement asks again the only peer that there is."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add(self, error: PeerError) -> None:
        """Leave the peer of ``error`` alone for a while. While it is, that is the same failure."""
        now = trio.current_time()
        before = self._entries.get(error.peer_id)
        if before is not None and now < before.until:
            return
        again = before is not None and now < before.until + MAX_AVOID_S
        for_s = min(2 * before.for_s, MAX_AVOID_S) if before is not None and again else AVOID_S
        self._entries[error.peer_id] = _Entry(now + for_s, for_s, error)

    def beside(self, error: PeerError) -> Avoided:
        """These as they are now, and the peer of ``error`` for good."""
        more = Avoided()
        more._entries = self._entries | {error.peer_id: _Entry(inf, inf, error)}
        return more

    def __getitem__(self, peer_id: str) -> PeerError:
        entry = self._entries[peer_id]
        if trio.current_time() >= entry.until:
            raise KeyError(peer_id)
        return entry.error

    def __iter__(self) -> Iterator[str]:
        now = trio.current_time()
        return iter([peer for peer, entry in self._entries.items() if now < entry.until])

    def __len__(self) -> int:
        return sum(1 for _ in self)
