"""Virtual time: what happens when, in order, and a digest of it."""

import hashlib
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

Action = Callable[[], None]


class Clock:
    """Runs actions at their times, in seconds from 0; those of one time in the order asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Action]] = []
        self._numbers = count()
        self._trace = hashlib.sha256()

    def after(self, delay_s: float, action: Action) -> None:
        heappush(self._queue, (self.now + delay_s, next(self._numbers), action))

    def note(self, *what: object) -> None:
        """Put an event into the trace whose digest tells two runs apart."""
        self._trace.update(f"{self.now:.9f} {' '.join(map(str, what))}\n".encode())

    def digest(self) -> str:
        """Of all events noted so far, 16 hex digits."""
        return self._trace.hexdigest()[:16]

    def run(self, until_s: float) -> None:
        """Up to and including ``until_s``."""
        while self._queue and self._queue[0][0] <= until_s:
            self.now, _, action = heappop(self._queue)
            action()
        self.now = until_s
