"""yamux, the stream multiplexer of libp2p, for connections that carry latency and bulk together.

Wire-compatible with every other yamux; what differs is inside. A write is sealed and sent from
the writer's own task while the socket takes it; only what it does not take is left to one writer
task. Frames are cut to fit one Noise message. Streams take turns, and messages of at most
SMALL_MESSAGE_BYTES go ahead of bulk. The receive window is enforced. A ping every PING_INTERVAL_S
measures the round trip and notices a peer that fell silent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from petalnode.errors import LocalProtocolError, PeerError, PeerGone, PeerMisbehaved
from petalnode.p2p.noise import BATCH_BYTES, MAX_MESSAGE_BYTES, NoiseSession
from petalnode.p2p.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    FrameReader,
)
from petalnode.p2p.yamux_pings import Pings
from petalnode.p2p.yamux_stream import Outgoing, Parking, Stream
from petalnode.p2p.yamux_turns import Turns

YAMUX_PROTOCOL = "/yamux/1.0.0"
MAX_STREAMS_EACH_WAY = 256
# Windows grow beyond their first 256 KiB only while all of a connection's together stay below.
GROWN_WINDOWS_BYTES = 64 * 1024 * 1024
MAX_CONTROL_BYTES = 48 * 1024
MIN_FRAME_BYTES = 1024
YIELD_AFTER_BYTES = 256 * 1024
YIELD_COST_BYTES = 4 * 1024
PING_INTERVAL_S = 2.0
SILENCE_LIMIT_S = 6.0
OVERSLEPT_S = 1.0
LINGER_S = 4.0
_MESSAGES_PER_BATCH = BATCH_BYTES // (2 + MAX_MESSAGE_BYTES)
_MAX_CREDIT = 1 << 32


class Muxer:
    """All streams of one secured connection. ``run`` must be running for anything to move.

    ``on_stream`` is called, synchronously, with each stream that the peer opens.
    """

    def __init__(self, session: NoiseSession, on_stream: Callable[[Stream], None]) -> None:
        self.peer_id = session.peer_id
        self.session = session
        self.failure: PeerError | None = None
        self.said_goodbye = False  # by either side: the connection was closed, it did not break
        self.streams: dict[int, Stream] = {}
        self._on_stream = on_stream
        self._next_id = 1 if session.is_initiator else 2
        self._opened = self._accepted = 0
        self._granted = 0
        self._control = bytearray()
        self._turns = Turns()
        self._since_yield = 0
        self._writer = Parking()
        self._scope = trio.CancelScope()
        self._frames = FrameReader(self)
        self._body_stream: Stream | None = None
        self._body_ends = False
        self._last_heard = trio.current_time()
        self._pings = Pings()
        self._lingering: dict[Stream, float] = {}

    # What its owner calls

    @property
    def rtt_s(self) -> float | None:
        """The least of the last round trips, in seconds: the path without its queues."""
        return self._pings.rtt_s

    async def run(self) -> PeerError:
        """Move bytes until the connection ends; returns why it did."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for loop in (self._read_loop, self._write_loop, self._keep_alive):
                        nursery.start_soon(self._guard, loop)
        finally:
            self.fail(self._gone("The connection was closed here."))
        return self.failure or self._misbehaved("is in an impossible state")

    def open_stream(self) -> Stream:
        """A new stream. Raises PeerGone, and LocalProtocolError at MAX_STREAMS_EACH_WAY."""
        if self.failure is not None:
            raise self._gone(self.failure.cause)
        if self._opened >= MAX_STREAMS_EACH_WAY:
            raise LocalProtocolError(
                f"{self._opened} streams to peer {self.peer_id} are open, which is the limit.",
                "Close some first.",
            )
        stream = Stream(self, self._next_id)
        self._next_id += 2
        self._opened += 1
        self.streams[stream.stream_id] = stream
        self._send_control(WINDOW_UPDATE, SYN, stream.stream_id, 0)
        self._writer.wake()
        return stream

    async def ping(self) -> float:
        """One round trip now, in seconds. Waits as long as it takes; raises PeerGone."""
        ponged = self._send_ping()
        self.flush()
        sent = trio.current_time()
        await ponged.wait()
        if self.failure is not None:
            raise self._gone(self.failure.cause)
        return trio.current_time() - sent

    def close(self) -> None:
        """Say goodbye, as far as the socket takes it, and end. Never raises."""
        if self.failure is None:
            self.said_goodbye = True
            self._control += HEADER.pack(0, GO_AWAY, 0, 0, 0)
            self.flush()
            self.fail(self._gone("The connection was closed here."))

    def fail(self, reason: PeerError) -> None:
        """The connection is over: every stream and waiter learns why. Never raises."""
        if self.failure is not None:
            return
        self.failure = reason
        self.session.close()
        for stream in self.streams.values():
            stream.fail(reason)
        self.streams.clear()
        self._lingering.clear()
        self._pings.end()
        self._scope.cancel()

    # What its streams call

    def schedule(self, stream: Stream) -> None:
        """Queue a stream for its turn if it has something to send and may."""
        self._turns.add(stream)

    def flush(self) -> None:
        """Send one batch from here if the socket is free; the writer task does the rest."""
        if self.failure is not None or self.session.blocked:
            return
        try:
            self._send_batch()
        except OSError as error:
            self._fail_broken(error)
            return
        if self.session.blocked or self._has_output:
            self._writer.wake()

    async def breathe(self, size: int) -> None:
        """Let other tasks run now and then, although nothing had to be waited for."""
        self._since_yield += size + YIELD_COST_BYTES
        if self._since_yield >= YIELD_AFTER_BYTES:
            self._since_yield = 0
            await trio.lowlevel.checkpoint()

    def abandon(self, stream: Stream) -> None:
        """Tell the peer that a stream is dropped, and forget it."""
        if self._forget(stream):
            self._send_control(WINDOW_UPDATE, RST, stream.stream_id, 0)
            self._writer.wake()

    def linger(self, stream: Stream) -> None:
        """Reset a finished stream later, should the peer not end its side."""
        self._lingering[stream] = trio.current_time() + LINGER_S

    def grant(self, wanted: int) -> int:
        """How far a window may grow, given those that have grown already."""
        granted = max(0, min(wanted, GROWN_WINDOWS_BYTES - self._granted))
        self._granted += granted
        return granted

    def send_window_update(self, stream: Stream, delta: int) -> None:
        """Allow the peer ``delta`` more bytes."""
        self._send_control(WINDOW_UPDATE, 0, stream.stream_id, delta)
        self._writer.wake()

    # Sending

    @property
    def _has_output(self) -> bool:
        return bool(self._control or self._turns)

    def _send_control(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        self._control += HEADER.pack(0, kind, flags, stream_id, value)
        if len(self._control) > MAX_CONTROL_BYTES:
            self.fail(self._misbehaved("asks for more answers than it reads"))

    def _send_batch(self) -> None:
        message = self.session.scratch.message
        for _ in range(_MESSAGES_PER_BATCH):
            size = self._fill(message)
            if not size:
                break
            self.session.seal(message[:size])
        self.session.push()

    def _fill(self, message: memoryview) -> int:
        """Put frames into one Noise message; returns its length."""
        size = len(self._control)
        message[:size] = self._control
        self._control.clear()
        while stream := self._turns.take():
            head = stream.outgoing[0]
            room = len(message) - size - HEADER.size
            if room < min(head.remaining, MIN_FRAME_BYTES):
                self._turns.put_back(stream)
                break
            size = self._emit(stream, head, message, size, room)
            self._turns.add(stream)
        return size

    def _emit(self, stream: Stream, head: Outgoing, message: memoryview, at: int, room: int) -> int:
        n = min(head.remaining, stream.credit, room)
        start = at + HEADER.size
        HEADER.pack_into(message, at, 0, DATA, FIN if head.is_end else 0, stream.stream_id, n)
        if n:
            head.copy_to(message[start : start + n])
            stream.credit -= n
            self._turns.sent(n)
        if not head.remaining:
            stream.outgoing.popleft()
            head.parking.wake()
            if head.is_end:
                stream.end_sent = True
                self._forget_if_done(stream)
        return start + n

    async def _write_loop(self) -> None:
        while True:
            if self.session.blocked:
                await self.session.drain()
            if self._has_output:
                self._send_batch()
                await trio.lowlevel.checkpoint()
            else:
                await self._writer.wait()

    # Receiving

    async def _read_loop(self) -> None:
        self._frames.feed(memoryview(self.session.take_early()))
        while True:
            plain = self.session.try_receive()
            if plain is None:
                await self.session.readable()
                continue
            self._last_heard = trio.current_time()
            self._frames.feed(plain)
            if self._control:
                self.flush()
            if self.session.may_have_more:
                await trio.lowlevel.checkpoint()
            else:
                await self.session.readable()

    @property
    def is_over(self) -> bool:
        """See ``FrameSink``."""
        return self.failure is not None

    def on_body(self, data: memoryview, *, is_last: bool) -> None:
        """See ``FrameSink``."""
        stream = self._body_stream
        if stream is not None and stream.failure is None:
            stream.deliver(data)
            if is_last and self._body_ends:
                self._on_end(stream)

    def on_header(self, version: int, kind: int, flags: int, stream_id: int, value: int) -> None:
        """See ``FrameSink``."""
        if version != 0 or kind > GO_AWAY:
            raise self._misbehaved("does not speak yamux")
        if kind == PING:
            self._on_ping(flags, value)
        elif kind == GO_AWAY:
            self.said_goodbye = True
            raise self._gone(f"Peer {self.peer_id} said goodbye.")
        else:
            self._on_stream_frame(kind, flags, stream_id, value)

    def _on_stream_frame(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        stream = self._accept(stream_id) if flags & SYN else self.streams.get(stream_id)
        if kind == DATA and value:
            self._body_stream, self._body_ends = stream, bool(flags & FIN)
            if stream is not None:
                stream.take_window(value)
        if stream is None:
            return
        if kind == WINDOW_UPDATE and value:
            stream.credit = min(stream.credit + value, _MAX_CREDIT)
            self._turns.add(stream)
            self._writer.wake()
        if flags & RST:
            self._forget(stream)
            stream.fail(self._gone(f"Peer {self.peer_id} reset the stream."))
        elif flags & FIN and not (kind == DATA and value):
            self._on_end(stream)

    def _accept(self, stream_id: int) -> Stream | None:
        if stream_id % 2 == self._next_id % 2 or stream_id == 0 or stream_id in self.streams:
            raise self._misbehaved("opens a stream with a number that is not its to take")
        if self._accepted >= MAX_STREAMS_EACH_WAY:
            self._send_control(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = Stream(self, stream_id)
        self._accepted += 1
        self.streams[stream_id] = stream
        self._send_control(WINDOW_UPDATE, ACK, stream_id, 0)
        self._on_stream(stream)
        return stream

    def _on_end(self, stream: Stream) -> None:
        stream.end()
        self._forget_if_done(stream)

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.end_sent and stream.end_received:
            self._forget(stream)

    def _forget(self, stream: Stream) -> bool:
        if self.streams.pop(stream.stream_id, None) is None:
            return False
        self._lingering.pop(stream, None)
        self._granted -= stream.grown_bytes
        if stream.stream_id % 2 == self._next_id % 2:
            self._opened -= 1
        else:
            self._accepted -= 1
        return True

    # Keeping watch

    def _send_ping(self) -> trio.Event:
        if self._pings.are_ignored:
            raise self._misbehaved("does not answer pings")
        number, ponged = self._pings.send()
        self._send_control(PING, SYN, 0, number)
        return ponged

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self._send_control(PING, ACK, 0, value)
        else:
            self._pings.answered(value)

    async def _keep_alive(self) -> None:
        while True:
            self._send_ping()
            self.flush()
            slept_from = trio.current_time()
            await trio.sleep(PING_INTERVAL_S)
            now = trio.current_time()
            # If this very program stood still, what the peer sent meanwhile is still unread.
            stood_still = now - slept_from > PING_INTERVAL_S + OVERSLEPT_S
            if now - self._last_heard > SILENCE_LIMIT_S and not stood_still:
                silence_s = now - self._last_heard
                raise self._gone(f"Peer {self.peer_id} fell silent for {silence_s:.0f} seconds.")
            for stream in [s for s, until in self._lingering.items() if until <= now]:
                stream.reset()
            self._pings.forget_lost(now)

    async def _guard(self, loop: Callable[[], Awaitable[None]]) -> None:
        try:
            await loop()
        except PeerError as error:
            self.fail(error)
        except OSError as error:
            self._fail_broken(error)

    def _fail_broken(self, error: OSError) -> None:
        try:
            # What the peer said last may be unread: a goodbye, which is no failure of its.
            while self.failure is None and (plain := self.session.try_receive()) is not None:
                self._frames.feed(plain)
        except PeerError as last_word:
            self.fail(last_word)
        except OSError:
            pass
        why = error.strerror or error
        self.fail(self._gone(f"The connection to peer {self.peer_id} broke: {why}."))

    def _gone(self, cause: str) -> PeerGone:
        return PeerGone(cause, peer_id=self.peer_id)

    def _misbehaved(self, what: str) -> PeerMisbehaved:
        return PeerMisbehaved(f"Peer {self.peer_id} {what}.", peer_id=self.peer_id)
