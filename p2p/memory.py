"""A byte stream between two ends of one process: what tests and the simulator speak over.

It behaves as a network stream does: writes wait while the reader is far behind, a clean end and a
reset look different, and a reset reaches the other side.
"""

from __future__ import annotations

import trio

from petalnode.errors import PeerGone
from petalnode.p2p.frames import Buffer, FrameStream

WINDOW_BYTES = 1024 * 1024


class _Pipe:
    """One direction: bytes, whether more will come, and who waits."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self.broken = False
        self._lot = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        self._lot.unpark_all()

    async def wait(self) -> None:
        await self._lot.park()


class MemoryByteStream:
    """One end of an in-memory ``ByteStream``; ``peer_id`` names the other end."""

    def __init__(self, peer_id: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.peer_id = peer_id
        self._in = incoming
        self._out = outgoing

    async def read_start(self, n: int) -> Buffer | None:
        """See ``ByteStream``."""
        while not self._in.data and not self._in.ended and not self._in.broken:
            await self._in.wait()
        if self._in.ended and not self._in.data and not self._in.broken:
            return None
        return await self.read_exactly(n)

    async def read_exactly(self, n: int) -> Buffer:
        """See ``ByteStream``."""
        pipe = self._in
        taken = bytearray()
        while len(taken) < n:
            if pipe.broken or (pipe.ended and not pipe.data):
                raise PeerGone(f"Peer {self.peer_id} ended the stream.", peer_id=self.peer_id)
            if not pipe.data:
                await pipe.wait()
                continue
            part = pipe.data[: n - len(taken)]
            del pipe.data[: len(part)]
            taken += part
            pipe.wake()
        await trio.lowlevel.checkpoint()
        return taken

    async def write(self, *buffers: Buffer) -> None:
        """See ``ByteStream``."""
        pipe = self._out
        await trio.lowlevel.checkpoint()
        while len(pipe.data) > WINDOW_BYTES and not pipe.broken:
            await pipe.wait()
        if pipe.broken or pipe.ended:
            raise PeerGone(f"The stream to peer {self.peer_id} is closed.", peer_id=self.peer_id)
        for buffer in buffers:
            pipe.data += buffer
        pipe.wake()

    async def close_write(self) -> None:
        """See ``ByteStream``."""
        self._out.ended = True
        self._out.wake()
        await trio.lowlevel.checkpoint()

    async def wait_broken(self) -> None:
        """See ``ByteStream``."""
        while not self._in.broken:
            await self._in.wait()

    def reset(self) -> None:
        """See ``ByteStream``."""
        for pipe in (self._in, self._out):
            pipe.broken = True
            pipe.wake()


def memory_byte_pair(
    peer_a: str = "alice", peer_b: str = "bob"
) -> tuple[MemoryByteStream, MemoryByteStream]:
    """Two connected ends: the first is alice's, so its ``peer_id`` is bob, and the other way."""
    to_b, to_a = _Pipe(), _Pipe()
    return MemoryByteStream(peer_b, to_a, to_b), MemoryByteStream(peer_a, to_b, to_a)


def memory_frame_pair(
    peer_a: str = "alice", peer_b: str = "bob"
) -> tuple[FrameStream, FrameStream]:
    """Two connected frame streams, named as in ``memory_byte_pair``."""
    a, b = memory_byte_pair(peer_a, peer_b)
    return FrameStream(a), FrameStream(b)
