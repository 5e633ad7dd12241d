"""What happened on a simulated network: a digest of every event, and counts of bytes.

Two runs went the same way if their digests are equal. Sizes go into it and contents do not, for
encryption draws its ephemeral keys from the machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque

RECENT_EVENTS = 10_000


class Trace:
    """``link_bytes`` counts payload of TCP by (source, target), ``stream_bytes`` what streams of
    petalnode's protocols carried, before encryption, by (source, target, protocol)."""

    def __init__(self) -> None:
        self.events = 0
        self.recent: deque[str] = deque(maxlen=RECENT_EVENTS)
        self.link_bytes: Counter[tuple[str, str]] = Counter()
        self.stream_bytes: Counter[tuple[str, str, str]] = Counter()
        self._hash = hashlib.sha256()

    def note(self, at: float, kind: str, source: str, target: str, size: int = 0) -> None:
        """One event at virtual time ``at``; ``size`` in bytes."""
        line = f"{at:.9f} {kind} {source}>{target} {size}"
        self.events += 1
        self.recent.append(line)
        self._hash.update(line.encode() + b"\n")
        if kind == "send":
            self.link_bytes[source, target] += size

    def count_stream(self, source: str, target: str, protocol: str, size: int) -> None:
        """``size`` bytes were written to a stream."""
        self.stream_bytes[source, target, protocol] += size

    @property
    def digest(self) -> str:
        """Over all events so far, in hexadecimal."""
        return self._hash.hexdigest()
