"""What gossip remembers to protect itself: ids it has seen, and how much each peer may still ask.

Both follow trio's clock and hold a bounded number of entries.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID

SEEN_FOR_S = 120.0
MAX_SEEN = 1 << 16


class SeenMessages:
    """Ids of messages, each for ``SEEN_FOR_S`` since it was last met, the oldest forgotten first.

    Stands in for libp2p's ``LastSeenCache``, which runs a thread and reads the wall clock.
    """

    def __init__(self, limit: int = MAX_SEEN) -> None:
        self._limit = limit
        self._until: dict[bytes, float] = {}  # in the order of their times

    def has(self, message_id: bytes) -> bool:
        """Whether it was seen lately; if so it counts as seen now."""
        if self._until.get(message_id, 0.0) <= trio.current_time():
            return False
        self.add(message_id)
        return True

    def add(self, message_id: bytes) -> bool:
        """See it now; returns whether it is new."""
        now = trio.current_time()
        known = self._until.pop(message_id, 0.0) > now
        self._until[message_id] = now + SEEN_FOR_S
        while len(self._until) > self._limit or next(iter(self._until.values())) <= now:
            del self._until[next(iter(self._until))]
        return not known

    def __len__(self) -> int:
        return len(self._until)


@dataclass
class _Bucket:
    tokens: float
    at: float


class Budgets:
    """Token buckets, one a peer: ``per_s`` each second, at most ``burst`` saved up."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: dict[ID, _Bucket] = {}

    def spend(self, peer: ID, keep: float = 0.0) -> bool:
        """Take one token; False when the peer has none left beyond ``keep``."""
        now = trio.current_time()
        bucket = self._buckets.setdefault(peer, _Bucket(self._burst, now))
        refill = (now - bucket.at) * self._per_s
        bucket.tokens, bucket.at = min(bucket.tokens + refill, self._burst), now
        if bucket.tokens < 1 + keep:
            return False
        bucket.tokens -= 1
        return True

    def refund(self, peer: ID) -> None:
        """Give the token of the last ``spend`` back."""
        bucket = self._buckets[peer]
        bucket.tokens = min(bucket.tokens + 1, self._burst)

    def keep_only(self, peers: Container[ID]) -> None:
        """Forget everybody else."""
        self._buckets = {peer: b for peer, b in self._buckets.items() if peer in peers}
