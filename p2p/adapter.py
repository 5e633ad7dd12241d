"""Our connections and streams as libp2p's services want them: gossip, identify, ping.

petalnode's own protocols do not come through here; they use ``yamux_stream.Stream`` as it is.
"""

from __future__ import annotations

from types import TracebackType

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from petalnode.errors import PeerError, PetalnodeError
from petalnode.p2p.noise import remote_multiaddrs
from petalnode.p2p.yamux import Muxer
from petalnode.p2p.yamux_stream import Stream

READ_ALL_LIMIT_BYTES = 16 * 1024 * 1024
READ_STEP_BYTES = 64 * 1024


class MuxedStream(IMuxedStream):
    """A stream with libp2p's signatures and exceptions."""

    def __init__(self, stream: Stream, muxed_conn: MuxedConn) -> None:
        self.stream = stream
        self.muxed_conn = muxed_conn

    async def read(self, n: int | None = None) -> bytes:
        """Up to ``n`` bytes; without ``n`` (or -1) everything until the end."""
        try:
            if n is not None and n >= 0:
                data = await self.stream.read_some(n) if n else b"empty"
            else:
                data = await self._read_to_end()
        except PeerError as error:
            raise MuxedStreamReset(error.cause) from error
        if not data:
            raise MuxedStreamEOF("The peer ended the stream.")
        return data if n != 0 else b""

    async def _read_to_end(self) -> bytes:
        data = bytearray()
        while part := await self.stream.read_some(READ_STEP_BYTES):
            data += part
            if len(data) > READ_ALL_LIMIT_BYTES:
                self.stream.reset()
                raise MuxedStreamReset("The peer sends without end.")
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """Send ``data``."""
        try:
            await self.stream.write(data)
        except PeerError as error:
            raise MuxedStreamClosed(error.cause) from error

    async def close(self) -> None:
        """End our direction."""
        await self.stream.close_write()

    async def reset(self) -> None:
        """Drop the stream."""
        self.stream.reset()

    def set_deadline(self, ttl: int) -> None:
        """Not offered: trio's cancel scopes are the deadlines here."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the peer."""
        return self.stream.muxer.session.wire.remote

    async def __aenter__(self) -> MuxedStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class MuxedConn(IMuxedConn):
    """A connection with libp2p's signatures. ``serve`` in swarm.py runs it, nobody calls start."""

    def __init__(self, muxer: Muxer, peer_id: ID) -> None:
        self.muxer = muxer
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.event_started.set()
        self.negotiated_security_protocol = "/noise"
        self.negotiated_muxer_protocol = "/yamux/1.0.0"

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self.muxer.session.is_initiator

    async def start(self) -> None:
        """Nothing to do: the swarm runs the muxer."""

    async def close(self) -> None:
        """Close the connection."""
        self.muxer.close()

    @property
    def is_established(self) -> bool:
        """Always: there is none before the handshake."""
        return True

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self.muxer.failure is not None

    async def open_stream(self) -> MuxedStream:
        """A new stream."""
        try:
            return MuxedStream(self.muxer.open_stream(), self)
        except PetalnodeError as error:
            raise MuxedConnUnavailable(error.cause) from error

    async def accept_stream(self) -> MuxedStream:
        """Not offered: the swarm is told of each stream."""
        raise MuxedConnUnavailable("Streams are handed to the swarm as they come.")

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The peer's address."""
        return remote_multiaddrs(self.muxer.session.wire)

    def get_connection_type(self) -> ConnectionType:
        """Always direct."""
        return ConnectionType.DIRECT
