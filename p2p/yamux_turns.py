"""Whose turn it is to send on a connection: small messages ahead of bulk, which never starves."""

from __future__ import annotations

from collections import deque

from petalnode.p2p.yamux_stream import Stream

# Bulk has its turn after this much of anything.
BULK_TURN_BYTES = 256 * 1024


class Turns:
    """The streams that have something to send and may, each queued once."""

    def __init__(self) -> None:
        self._small: deque[Stream] = deque()
        self._bulk: deque[Stream] = deque()
        self._since_bulk = 0

    def __bool__(self) -> bool:
        return bool(self._small or self._bulk)

    def add(self, stream: Stream) -> None:
        """Queue a stream behind its like, if it has something to send and may."""
        if not stream.is_queued and stream.may_send:
            stream.is_queued = True
            self._queue(stream).append(stream)

    def put_back(self, stream: Stream) -> None:
        """Its message did not fit: it is next again."""
        stream.is_queued = True
        queue = self._queue(stream)
        queue.appendleft(stream)
        if queue is self._bulk:
            self._since_bulk = BULK_TURN_BYTES

    def take(self) -> Stream | None:
        """The stream whose turn it is; it leaves the queue."""
        while queue := self._next_queue():
            stream = queue.popleft()
            stream.is_queued = False
            if stream.may_send:
                return stream
        return None

    def sent(self, n: int) -> None:
        """``n`` bytes went out."""
        self._since_bulk += n

    def _queue(self, stream: Stream) -> deque[Stream]:
        return self._small if stream.is_small else self._bulk

    def _next_queue(self) -> deque[Stream]:
        if self._small and (self._since_bulk < BULK_TURN_BYTES or not self._bulk):
            return self._small
        if self._bulk:
            self._since_bulk = 0
        return self._bulk
