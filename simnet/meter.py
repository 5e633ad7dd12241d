"""A stream that counts what is written to it, by sender, receiver and protocol."""

from __future__ import annotations

from collections.abc import Callable

from petalnode.bandwidth import PassingStream
from petalnode.p2p.frames import Buffer, ByteStream

Count = Callable[[str, str, int], None]
"""Called with the receiver's peer id, the protocol, and a number of bytes."""


class MeteredStream(PassingStream):
    """Its writes are counted, also those that fail."""

    def __init__(self, inner: ByteStream, protocol: str, count: Count) -> None:
        super().__init__(inner)
        self._protocol = protocol
        self._count = count

    async def write(self, *buffers: Buffer) -> None:
        """See ``ByteStream``."""
        self._count(self.peer_id, self._protocol, sum(map(len, buffers)))
        await self._inner.write(*buffers)
