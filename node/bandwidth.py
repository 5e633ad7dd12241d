"""How fast this node can send, measured on what it sends anyway.

A large message that takes a while to send leaves as fast as the link takes it; one that is gone at
once has only vanished in the buffers on the way, and proves no more than that the link is not slow.
Links too fast to be measured in this way cost next to nothing. The best of late stands: a link does
not become slow because a peer is busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from petalnode.p2p.frames import Buffer, ByteStream

LARGE_BYTES = 1 << 18
"""Smaller messages say nothing."""
FULL_S = 0.2
"""Until a message that still waits has filled the buffers: several round trips of a long path."""
FADE = 0.1
"""Of the distance to each slower sample that an estimate gives way."""
MEMORY_S = 900.0
"""For how long a measurement counts."""


class BandwidthMeter:
    """Bytes a second, by ``clock`` (seconds)."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._estimate = 0.0
        self._measured_at = -math.inf

    @property
    def bytes_per_s(self) -> float:
        """What was measured lately; 0 if nothing was."""
        return self._estimate if self._clock() - self._measured_at < MEMORY_S else 0.0

    def sent(self, size: int, seconds: float) -> None:
        """A message of ``size`` bytes took so long to send."""
        if size < LARGE_BYTES:
            return
        known, sample = self.bytes_per_s, size / max(seconds, FULL_S)
        if seconds >= FULL_S:
            self._estimate = max(sample, known + FADE * (sample - known))
            self._measured_at = self._clock()
        elif known:
            self._estimate = max(sample, known)  # at least so fast

    def tap(self, stream: ByteStream, _protocol: str) -> ByteStream:
        """The stream, watched: a ``p2p.host.Tap``."""
        return TimedStream(stream, self)


class PassingStream:
    """A ``ByteStream`` around another, for those that watch one."""

    def __init__(self, inner: ByteStream) -> None:
        self.peer_id = inner.peer_id
        self._inner = inner

    async def read_start(self, n: int) -> Buffer | None:
        """See ``ByteStream``."""
        return await self._inner.read_start(n)

    async def read_exactly(self, n: int) -> Buffer:
        """See ``ByteStream``."""
        return await self._inner.read_exactly(n)

    async def write(self, *buffers: Buffer) -> None:
        """See ``ByteStream``."""
        await self._inner.write(*buffers)

    async def close_write(self) -> None:
        """See ``ByteStream``."""
        await self._inner.close_write()

    async def wait_broken(self) -> None:
        """See ``ByteStream``."""
        await self._inner.wait_broken()

    def reset(self) -> None:
        """See ``ByteStream``."""
        self._inner.reset()


class TimedStream(PassingStream):
    """Its writes are timed."""

    def __init__(self, inner: ByteStream, meter: BandwidthMeter) -> None:
        super().__init__(inner)
        self._meter = meter

    async def write(self, *buffers: Buffer) -> None:
        """See ``ByteStream``."""
        size, started = sum(map(len, buffers)), trio.current_time()
        await self._inner.write(*buffers)
        self._meter.sent(size, trio.current_time() - started)
