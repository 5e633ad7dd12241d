"""How fast this node can send, measured on what it sends anyway.

A large message leaves as fast as the link takes it once the buffers on the way are full, so the
time that its writing took bounds the bandwidth from above, and from below where it had to wait for
the receiver. The best of late stands: a link does not become slow because a peer is busy.
"""

from __future__ import annotations

import trio

from petalnode.p2p.frames import Buffer, ByteStream

LARGE_BYTES = 1 << 18
"""Smaller messages vanish in buffers, and say nothing."""
FADE = 0.1
"""Of the distance to each slower sample that an estimate gives way."""
MIN_S = 1e-4


class BandwidthMeter:
    """``bytes_per_s`` is 0 until something large was sent."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0

    def sent(self, size: int, seconds: float) -> None:
        """A message of ``size`` bytes took so long to send."""
        if size < LARGE_BYTES:
            return
        sample = size / max(seconds, MIN_S)
        slower = self.bytes_per_s + FADE * (sample - self.bytes_per_s)
        self.bytes_per_s = max(sample, slower)

    def tap(self, stream: ByteStream, _protocol: str) -> ByteStream:
        """The stream, watched: a ``p2p.host.Tap``."""
        return TimedStream(stream, self)


class TimedStream:
    """A ``ByteStream`` around another, whose writes are timed."""

    def __init__(self, inner: ByteStream, meter: BandwidthMeter) -> None:
        self.peer_id = inner.peer_id
        self._inner = inner
        self._meter = meter

    async def read_start(self, n: int) -> Buffer | None:
        """See ``ByteStream``."""
        return await self._inner.read_start(n)

    async def read_exactly(self, n: int) -> Buffer:
        """See ``ByteStream``."""
        return await self._inner.read_exactly(n)

    async def write(self, *buffers: Buffer) -> None:
        """See ``ByteStream``."""
        size, started = sum(map(len, buffers)), trio.current_time()
        await self._inner.write(*buffers)
        self._meter.sent(size, trio.current_time() - started)

    async def close_write(self) -> None:
        """See ``ByteStream``."""
        await self._inner.close_write()

    async def wait_broken(self) -> None:
        """See ``ByteStream``."""
        await self._inner.wait_broken()

    def reset(self) -> None:
        """See ``ByteStream``."""
        self._inner.reset()
