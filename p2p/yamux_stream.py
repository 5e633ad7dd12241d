"""One stream of a yamux connection: bytes both ways, each with its own window.

Reading: whoever asks for n bytes gets them put straight into place as they arrive; what nobody
asked for yet waits in a buffer that the window bounds. Consuming half a window tells the peer so,
and doubles the window while it is less than three bandwidth-delay products: enough to keep the path
busy, and little in queues. (With a window of a few MiB on loopback a 4 KiB echo beside bulk took
5 ms, with 256 KiB 0.3 ms, and bulk was no faster.)

Writing: a message waits in the stream's queue until the connection has taken its last byte.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import trio

from petalnode.errors import PeerError, PeerGone, PeerMisbehaved

if TYPE_CHECKING:
    from petalnode.p2p.yamux import Muxer

INITIAL_WINDOW_BYTES = 256 * 1024  # fixed by yamux
MAX_WINDOW_BYTES = 16 * 1024 * 1024
# Two keep a path busy when half windows are returned; one more, for frames do not fit them evenly.
WINDOW_PER_BDP = 3.0
# Below this a measured round trip is mostly waiting for a core, and 256 KiB fill a gigabit anyway.
RTT_NOISE_S = 0.002
# A message up to this size goes ahead of other streams' bulk.
SMALL_MESSAGE_BYTES = 64 * 1024

Buffer = bytes | bytearray | memoryview


class Parking:
    """Where one task waits and is woken."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        """Wait for ``wake``. A second task at the same time is a bug and raises."""
        if self._task is not None:
            raise trio.BusyResourceError("another task is already waiting here")
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def wake(self) -> None:
        """Let the waiting task go on, if there is one."""
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Outgoing:
    """One message on its way out, or the end of the stream (no bytes, ``is_end``)."""

    __slots__ = ("_at", "_views", "is_end", "parking", "remaining", "size")

    def __init__(self, buffers: tuple[Buffer, ...], *, is_end: bool = False) -> None:
        self._views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self._views.reverse()
        self._at = 0
        self.size = self.remaining = sum(len(view) for view in self._views)
        self.is_end = is_end
        self.parking = Parking()

    def copy_to(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes; no more are asked for than remain."""
        filled, wanted = 0, len(out)
        while filled < wanted:
            view = self._views[-1]
            n = min(wanted - filled, len(view) - self._at)
            out[filled : filled + n] = view[self._at : self._at + n]
            filled += n
            self._at += n
            if self._at == len(view):
                self._views.pop()
                self._at = 0
        self.remaining -= wanted


class Stream:
    """One stream, satisfying ``petalnode.p2p.frames.ByteStream``. Made by ``Muxer`` alone.

    One task reads at a time; any number may write, each ``write`` is one uninterrupted run.
    """

    def __init__(self, muxer: Muxer, stream_id: int) -> None:
        self.peer_id = muxer.peer_id
        self.stream_id = stream_id
        self.failure: PeerError | None = None
        self.outgoing: deque[Outgoing] = deque()
        self.credit = INITIAL_WINDOW_BYTES
        self.is_queued = False
        self.end_sent = False
        self.end_received = False
        self._muxer = muxer
        self._ending = False
        self._dropped = False
        self._discarding = False
        self._buffer = bytearray()
        self._wanted: memoryview | None = None
        self._filled = 0
        self._reader = Parking()
        self._window = INITIAL_WINDOW_BYTES
        self._window_left = INITIAL_WINDOW_BYTES
        self._consumed = 0
        self._epoch = trio.current_time()
        self._failed = trio.Event()

    @property
    def muxer(self) -> Muxer:
        """The connection this stream belongs to."""
        return self._muxer

    # Reading

    async def read_exactly(self, n: int) -> Buffer:
        """The next ``n`` bytes. Raises PeerGone when the stream ends or is reset before."""
        buffer = self._buffer
        if len(buffer) >= n:
            taken = buffer[:n]
            del buffer[:n]
            self._on_consumed(n)
            return taken
        return await self._wait_for(n)

    async def read_start(self, n: int) -> Buffer | None:
        """As ``read_exactly``, but None when the peer ended cleanly before the first byte."""
        if len(self._buffer) < n and not await self.wait_for_data():
            return None
        return await self.read_exactly(n)

    async def read_some(self, limit: int) -> bytes:
        """At least one byte and at most ``limit``; empty at a clean end."""
        if not await self.wait_for_data():
            return b""
        taken = bytes(self._buffer[:limit])
        del self._buffer[:limit]
        self._on_consumed(len(taken))
        return taken

    async def wait_for_data(self) -> bool:
        """True once there is something to read, False at a clean end. Raises PeerGone."""
        while not self._buffer:
            # What ended cleanly stays a clean end, whatever became of the connection since.
            if self.end_received and not self._dropped:
                return False
            if self.failure is not None:
                raise self._gone()
            await self._reader.wait()
        return True

    async def _wait_for(self, n: int) -> memoryview:
        if self._wanted is not None:
            raise trio.BusyResourceError("another task is already reading this stream")
        held = len(self._buffer)
        # Not zeroed: what is announced but never sent takes no memory.
        target = np.empty(n, dtype=np.uint8).data
        target[:held] = self._buffer
        self._buffer.clear()
        self._on_consumed(held)
        self._wanted, self._filled = target, held
        try:
            while self._filled < n:
                if self.failure is not None or self.end_received:
                    raise self._gone()
                await self._reader.wait()
        except trio.Cancelled:
            self._buffer[:0] = target[: self._filled]
            raise
        finally:
            self._wanted = None
        return target

    def _gone(self) -> PeerGone:
        cause = self.failure.cause if self.failure else f"Peer {self.peer_id} ended the stream."
        return PeerGone(cause, peer_id=self.peer_id)

    async def wait_broken(self) -> None:
        """Until the stream is reset by either side, or its connection ends."""
        await self._failed.wait()

    # Writing

    async def write(self, *buffers: Buffer) -> None:
        """Send the buffers as one run; returns once the connection has taken the last byte.

        A cancelled write resets this stream, for the peer cannot make sense of half a message.
        Raises PeerGone when the stream is reset or closed for writing.
        """
        self._check_writable()
        message = Outgoing(buffers)
        if not message.remaining:
            return
        self._enqueue(message)
        if message.remaining:
            await self._wait_until_sent(message)
        else:
            await self._muxer.breathe(message.size)

    async def _wait_until_sent(self, message: Outgoing) -> None:
        try:
            while message.remaining and self.failure is None:
                await message.parking.wait()
        except trio.Cancelled:
            if message.remaining:
                self.reset()
            raise
        if message.remaining:
            raise self._gone()

    async def close_write(self) -> None:
        """Say that no more will come, once what is queued has gone. Does not wait."""
        if self.failure is None and not self._ending:
            self._ending = True
            self._enqueue(Outgoing((), is_end=True))

    def _enqueue(self, message: Outgoing) -> None:
        self.outgoing.append(message)
        self._muxer.schedule(self)
        self._muxer.flush()

    def _check_writable(self) -> None:
        if self.failure is not None:
            raise self._gone()
        if self._ending:
            raise PeerGone("This stream was closed for writing here.", peer_id=self.peer_id)

    # Ending

    def reset(self) -> None:
        """Drop the stream at once, both ways. Never raises."""
        if self.failure is None:
            self._dropped = True
            self._muxer.abandon(self)
            self.fail(PeerGone("This stream was reset here.", peer_id=self.peer_id))

    async def finish(self) -> None:
        """We are done with it: end our side, ignore what still comes, reset it if that lasts."""
        await self.close_write()
        self._discarding = True
        self._buffer.clear()
        if self.failure is None and not (self.end_received and self.end_sent):
            self._muxer.linger(self)

    # Called by the muxer

    def fail(self, reason: PeerError) -> None:
        """The stream is dead: wake whoever waits on it."""
        if self.failure is None:
            self.failure = reason
            self._failed.set()
            self._reader.wake()
            for message in self.outgoing:
                message.parking.wake()
            self.outgoing.clear()

    @property
    def may_send(self) -> bool:
        """Whether its first message can go on."""
        return bool(self.outgoing) and (self.credit > 0 or self.outgoing[0].is_end)

    @property
    def is_small(self) -> bool:
        """Whether its first message goes ahead of bulk."""
        return self.outgoing[0].size <= SMALL_MESSAGE_BYTES

    @property
    def grown_bytes(self) -> int:
        """What its window has beyond the first 256 KiB."""
        return self._window - INITIAL_WINDOW_BYTES

    def take_window(self, n: int) -> None:
        """The peer announces ``n`` bytes. Raises PeerMisbehaved beyond what it was allowed."""
        self._window_left -= n
        if self._window_left < 0:
            raise PeerMisbehaved(
                f"Peer {self.peer_id} sent more than the stream's window allows.",
                peer_id=self.peer_id,
            )

    def deliver(self, data: memoryview) -> None:
        """Bytes have arrived."""
        if self._wanted is not None:
            n = min(len(data), len(self._wanted) - self._filled)
            self._wanted[self._filled : self._filled + n] = data[:n]
            self._filled += n
            self._on_consumed(n)
            if self._filled == len(self._wanted):
                self._reader.wake()
            if n == len(data):
                return
            data = data[n:]
        elif not self._discarding:
            self._reader.wake()
        if not self._discarding:
            self._buffer += data

    def end(self) -> None:
        """The peer will send no more."""
        self.end_received = True
        self._reader.wake()

    def _on_consumed(self, n: int) -> None:
        self._consumed += n
        if self._consumed * 2 < self._window or self.end_received or self.failure is not None:
            return
        now = trio.current_time()
        rtt = self._muxer.rtt_s
        grown = 0
        if rtt is not None and self._window * (now - self._epoch) < (
            WINDOW_PER_BDP * self._consumed * (rtt - RTT_NOISE_S)
        ):
            grown = self._muxer.grant(min(self._window, MAX_WINDOW_BYTES - self._window))
        delta = self._consumed + grown
        self._window += grown
        self._window_left += delta
        self._consumed = 0
        self._epoch = now
        self._muxer.send_window_update(self, delta)
