"""A ``Wire`` within one process: what tests put below a connection instead of a socket."""

from __future__ import annotations

import errno

import trio

from petalnode.p2p.wire import WOULD_BLOCK

CAPACITY_BYTES = 256 * 1024


class MemoryWire:
    """One end. ``frozen`` makes it deaf and mute without closing it, as a dead peer's is."""

    def __init__(self, capacity: int = CAPACITY_BYTES) -> None:
        self.remote: tuple[str, int] | None = None
        self.frozen = False
        self.closed = False
        self.hung_up = False
        self.capacity = capacity
        self.arrived = bytearray()
        self.other = self
        self._lot = trio.lowlevel.ParkingLot()

    def try_receive(self, buffer: memoryview) -> int:
        """See ``Wire``."""
        self._check()
        if self.frozen or (not self.arrived and not self.other.hung_up):
            return WOULD_BLOCK
        taken = self.arrived[: len(buffer)]
        buffer[: len(taken)] = taken
        del self.arrived[: len(taken)]
        self.other.wake()
        return len(taken)

    def try_send(self, data: memoryview | bytes) -> int:
        """See ``Wire``."""
        self._check()
        if self.other.hung_up:
            raise BrokenPipeError(errno.EPIPE, "the other end is closed")
        room = 0 if self.frozen else self.capacity - len(self.other.arrived)
        sent = bytes(data[: max(0, room)])
        self.other.arrived += sent
        self.other.wake()
        return len(sent)

    async def readable(self) -> None:
        """See ``Wire``."""
        await trio.lowlevel.checkpoint()
        while self.frozen or (not self.arrived and not self.other.hung_up):
            self._check()
            await self._lot.park()
        self._check()

    async def writable(self) -> None:
        """See ``Wire``."""
        await trio.lowlevel.checkpoint()
        while self.frozen or (len(self.other.arrived) >= self.capacity and not self.other.hung_up):
            self._check()
            await self._lot.park()
        self._check()

    def close(self) -> None:
        """See ``Wire``. A frozen end's closing is not heard either."""
        self.closed = True
        self.hung_up = not self.frozen
        self.wake()
        self.other.wake()

    def wake(self) -> None:
        """Something has changed: let waiters look again."""
        self._lot.unpark_all()

    def _check(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "closed here")


def memory_wire_pair(capacity: int = CAPACITY_BYTES) -> tuple[MemoryWire, MemoryWire]:
    """Two connected ends, each holding up to ``capacity`` bytes that were not received yet."""
    a, b = MemoryWire(capacity), MemoryWire(capacity)
    a.other, b.other = b, a
    return a, b
