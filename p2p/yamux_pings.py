"""The pings of one yamux connection: what is on its way, and how long the last ones took."""

from __future__ import annotations

from collections import deque

import trio

RTT_SAMPLES = 16
MAX_PINGS = 64
PONG_LIMIT_S = 30.0


class Pings:
    """See the module. Numbers are those on the wire."""

    def __init__(self) -> None:
        self._last = 0
        self._sent: dict[int, tuple[float, trio.Event]] = {}
        self._rtts: deque[float] = deque(maxlen=RTT_SAMPLES)

    @property
    def rtt_s(self) -> float | None:
        """The least of the last round trips, in seconds; None before the first."""
        return min(self._rtts) if self._rtts else None

    @property
    def are_ignored(self) -> bool:
        """Whether the peer leaves more of them unanswered than it may."""
        return len(self._sent) >= MAX_PINGS

    def send(self) -> tuple[int, trio.Event]:
        """A new ping's number, and what is set when it was answered, or the connection ended."""
        self._last = (self._last + 1) % (1 << 32)
        ponged = trio.Event()
        self._sent[self._last] = (trio.current_time(), ponged)
        return self._last, ponged

    def answered(self, number: int) -> None:
        """A pong came, for a ping of ours or for none."""
        if number in self._sent:
            sent, ponged = self._sent.pop(number)
            self._rtts.append(trio.current_time() - sent)
            ponged.set()

    def forget_lost(self, now: float) -> None:
        """A peer may lose a pong when it is busy; that must not count for ever."""
        for lost in [n for n, (sent, _) in self._sent.items() if now - sent > PONG_LIMIT_S]:
            del self._sent[lost]

    def end(self) -> None:
        """Wake everybody who waits."""
        for _, ponged in self._sent.values():
            ponged.set()
