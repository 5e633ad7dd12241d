"""A stream that counts what is written to it, by sender, receiver and protocol."""

from __future__ import annotations

from collections.abc import Callable

from petalnode.p2p.frames import Buffer, ByteStream

Count = Callable[[str, str, int], None]
"""Called with the receiver's peer id, the protocol, and a number of bytes."""


class MeteredStream:
    """A ``ByteStream`` around another."""

    def __init__(self, inner: ByteStream, protocol: str, count: Count) -> None:
        self.peer_id = inner.peer_id
        self._inner = inner
        self._protocol = protocol
        self._count = count

    async def read_start(self, n: int) -> Buffer | None:
        """See ``ByteStream``."""
        return await self._inner.read_start(n)

    async def read_exactly(self, n: int) -> Buffer:
        """See ``ByteStream``."""
        return await self._inner.read_exactly(n)

    async def write(self, *buffers: Buffer) -> None:
        """See ``ByteStream``."""
        self._count(self.peer_id, self._protocol, sum(map(len, buffers)))
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
