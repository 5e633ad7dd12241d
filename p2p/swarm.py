"""The swarm: all connections of one host, as py-libp2p's services see them, but run by us.

It is py-libp2p's ``Swarm`` with everything that listens, dials, upgrades and serves overridden
(libp2p 0.8.1; what each override mends is in docs/architecture.md): Noise alone is spoken, a
connection is one task that ends with it, an exception in a stream handler costs that stream,
nobody is dialled unasked. One nursery holds it all; leaving ``run_swarm`` ends it.

Supervision points, where any exception is logged and costs no more than what it came from:
``_shake_hands`` (an inbound handshake), ``_serve_connection``, ``_serve_stream`` (a handler).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import cast

import trio
from libp2p.abc import IListener, INetConn, INetStream
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm as Libp2pSwarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.stream_muxer.yamux.yamux import Yamux as StockYamux
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from petalnode.errors import PeerError
from petalnode.p2p.adapter import MuxedConn, MuxedStream
from petalnode.p2p.negotiate import Pipe, answer, propose
from petalnode.p2p.noise import NOISE_PROTOCOL, NoiseSecurity, RawPipe
from petalnode.p2p.translate import dial_target, in_words
from petalnode.p2p.wire import TCP, Listening, Transport, Wire
from petalnode.p2p.yamux import YAMUX_PROTOCOL, Muxer
from petalnode.p2p.yamux_stream import Stream

DIAL_DEADLINE_S = 6.0
HANDSHAKE_DEADLINE_S = 5.0
NEGOTIATION_DEADLINE_S = 10.0
# Beyond this the oldest handshake makes room for the newest: silent dialers cannot lock us up.
MAX_HANDSHAKES = 512
MAX_CONNECTIONS = 2048
MAX_CONNECTIONS_PER_PEER = 16
ACCEPT_PAUSE_S = 0.1

StreamHandler = Callable[[Stream], Awaitable[None]]
log = logging.getLogger("petalnode.p2p")


class Connection(SwarmConn):
    """One connection. ``muxer`` is what petalnode uses, the rest is for libp2p's services."""

    def __init__(self, muxer: Muxer, swarm: Swarm) -> None:
        peer_id = ID.from_string(muxer.peer_id)
        direction = "outbound" if muxer.session.is_initiator else "inbound"
        muxed = MuxedConn(muxer, peer_id)
        super().__init__(muxed, swarm, direction=direction)
        self.muxer = muxer
        self.muxed = muxed
        self.peer_id = peer_id
        self.set_transport_info(muxed.get_transport_addresses(), muxed.get_connection_type())
        self.set_negotiated_protocols(NOISE_PROTOCOL, YAMUX_PROTOCOL)
        self.event_started.set()

    async def close(self) -> None:
        """Close it; the task that serves it does the rest."""
        self.muxer.close()

    @property
    def is_in_use(self) -> bool:
        """Whether there is any stream but those of libp2p's services."""
        services = {cast(MuxedStream, net.muxed_stream).stream.stream_id for net in self.streams}
        return not self.muxer.streams.keys() <= services

    async def net_stream(self, stream: Stream) -> NetStream:
        """A stream as libp2p's services want it."""
        return await self._add_stream(MuxedStream(stream, self.muxed))


class Listener(IListener):
    """One place to listen. The swarm accepts from it."""

    def __init__(self, source: Listening) -> None:
        self.source = source

    async def listen(self, maddr: Multiaddr) -> None:
        """It listens already."""

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """The bound address, with the real port."""
        host, port = self.source.address
        return (Multiaddr(f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"),)

    async def close(self) -> None:
        """Stop listening."""
        self.source.close()


class Swarm(Libp2pSwarm):
    """See the module. ``handlers`` are petalnode's protocols, ``libp2p_handlers`` the others."""

    def __init__(
        self, key_pair: KeyPair, nursery: trio.Nursery, transport: Transport = TCP
    ) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        # Only for what libp2p upgrades by itself (relayed connections): stock, but Noise alone.
        upgrader = TransportUpgrader(
            {TProtocol(NOISE_PROTOCOL): StockNoise(key_pair, X25519PrivateKey.new())},
            {TProtocol(YAMUX_PROTOCOL): StockYamux},
        )
        config = ConnectionConfig(
            max_connections=MAX_CONNECTIONS,
            high_watermark=MAX_CONNECTIONS,
            min_connections=0,
            low_watermark=0,
        )
        super().__init__(peer_id, peerstore, upgrader, [], connection_config=config)
        self.handlers: dict[str, StreamHandler] = {}
        self.libp2p_handlers: Mapping[TProtocol | None, StreamHandlerFn | None] = {}
        self.on_disconnected: Callable[[str, bool], None] = lambda _peer_id, _goodbye: None
        self._security = NoiseSecurity(key_pair)
        self._nursery = nursery
        self._transport = transport
        self._by_muxer: dict[Muxer, Connection] = {}
        self._handshakes: dict[trio.CancelScope, None] = {}
        self.background_nursery = nursery
        self.event_background_nursery_created.set()

    # Connections

    def connection(self, peer_id: ID) -> Connection | None:
        """A live connection to a peer, the oldest; None without one."""
        for found in self.connections.get(peer_id, ()):
            if not found.muxed_conn.is_closed:
                return cast(Connection, found)
        return None

    async def dial(self, addr: Multiaddr, expected: ID | None) -> Connection:
        """Connect to one address; ``expected`` None takes whoever answers.

        Raises PeerError, OSError, trio.TooSlowError, libp2p's HandshakeFailure.
        """
        host, port = dial_target(addr)
        with trio.fail_after(DIAL_DEADLINE_S):
            wire = await self._transport.dial(host, port)
            try:
                muxer = await self._upgrade(wire, True, expected)
            except BaseException:
                wire.close()
                raise
        connection = self._add(muxer)
        self._nursery.start_soon(self._serve_connection, connection)
        return connection

    async def _upgrade(self, wire: Wire, is_initiator: bool, expected: ID | None) -> Muxer:
        agree: Callable[[Pipe, str], Awaitable[None]] = propose if is_initiator else _answer_with
        pipe = RawPipe(wire, is_initiator, str(expected or ""))
        await agree(pipe, NOISE_PROTOCOL)
        session = await self._security.secure(pipe, expected)
        await agree(session, YAMUX_PROTOCOL)
        return Muxer(session, self._on_stream)

    def _add(self, muxer: Muxer) -> Connection:
        connection = Connection(muxer, self)
        self._by_muxer[muxer] = connection
        self.connections.setdefault(connection.peer_id, []).append(connection)
        return connection

    def _admit(self, muxer: Muxer) -> Connection | None:
        """Add an inbound connection, unless that peer has its share of them already."""
        held = self.connections.get(ID.from_string(muxer.peer_id), ())
        if len(held) >= MAX_CONNECTIONS_PER_PEER:
            muxer.close()
            return None
        return self._add(muxer)

    async def _serve_connection(self, connection: Connection) -> None:
        muxer = connection.muxer
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.notify_connected, connection)
                reason = await muxer.run()
                log.debug("connection ended: %s", reason.cause)
        except Exception:
            log.exception("a connection to %s failed in a way it must not", muxer.peer_id)
        finally:
            connection.event_closed.set()
            del self._by_muxer[muxer]
            self.remove_conn(connection)
            if not self.connections.get(connection.peer_id):
                self.on_disconnected(muxer.peer_id, muxer.said_goodbye)
        await self.notify_disconnected(connection)

    async def close(self) -> None:
        """Stop listening and say goodbye to everyone. Does not wait for anybody."""
        for listener in self.listeners.values():
            await listener.close()
        self.listeners.clear()
        for muxer in list(self._by_muxer):
            muxer.close()

    # Listening

    def bind(self, host: str, port: int) -> Multiaddr:
        """Listen there from now on; returns the address with the real port. Raises OSError."""
        listener = Listener(self._transport.listen(host, port))
        (bound,) = listener.get_addrs()
        self.listeners[str(bound)] = listener
        self._nursery.start_soon(self._accept_from, listener.source)
        return bound

    async def _accept_from(self, listening: Listening) -> None:
        while True:
            try:
                wire = await listening.accept()
            except trio.ClosedResourceError:
                return
            except OSError:
                # Out of file descriptors, or the dialler left: others may do better shortly.
                await trio.sleep(ACCEPT_PAUSE_S)
            else:
                self._nursery.start_soon(self._welcome, wire)
                await trio.lowlevel.checkpoint()

    async def _welcome(self, wire: Wire) -> None:
        try:
            connection = await self._shake_hands(wire)
            if connection is not None:
                await self._serve_connection(connection)
        finally:
            wire.close()

    async def _shake_hands(self, wire: Wire) -> Connection | None:
        if len(self._handshakes) >= MAX_HANDSHAKES:
            next(iter(self._handshakes)).cancel()
        with trio.move_on_after(HANDSHAKE_DEADLINE_S) as scope:
            self._handshakes[scope] = None
            try:
                if len(self._by_muxer) < MAX_CONNECTIONS:
                    return self._admit(await self._upgrade(wire, False, None))
            except Exception as error:  # noqa: BLE001 - supervision point, see the module
                log.debug("an inbound handshake failed: %s", in_words(error))
            finally:
                self._handshakes.pop(scope, None)
        return None

    # Streams

    def _on_stream(self, stream: Stream) -> None:
        self._nursery.start_soon(self._serve_stream, stream)

    async def _serve_stream(self, stream: Stream) -> None:
        finished = False
        try:
            with trio.fail_after(NEGOTIATION_DEADLINE_S):
                protocol = await answer(stream, self._offered())
            if protocol in self.handlers:
                await self.handlers[protocol](stream)
            else:
                await self._serve_libp2p(stream, TProtocol(protocol))
            await stream.finish()
            finished = True
        except (PeerError, trio.TooSlowError) as error:
            log.debug("a stream of %s ended: %s", stream.peer_id, error)
        except Exception:
            log.exception("the handler of a stream of %s failed", stream.peer_id)
        finally:
            if not finished:
                stream.reset()

    def _offered(self) -> set[str]:
        return {*self.handlers, *(str(name) for name in self.libp2p_handlers if name)}

    async def _serve_libp2p(self, stream: Stream, protocol: TProtocol) -> None:
        connection = self._by_muxer.get(stream.muxer)
        handler = self.libp2p_handlers.get(protocol)
        if connection is None or handler is None:
            return
        net_stream = await connection.net_stream(stream)
        net_stream.set_protocol(protocol)
        try:
            await handler(net_stream)
        finally:
            connection.remove_stream(net_stream)

    # What libp2p's services call

    async def new_stream(self, peer_id: ID) -> INetStream:
        """A stream on the peer's connection; dials addresses of the peerstore without one."""
        connection = self.connection(peer_id)
        if connection is None:
            connection = cast(Connection, (await self.dial_peer(peer_id))[0])
        return await connection.new_stream()

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Try the peer's addresses in the peerstore one after the other."""
        try:
            addrs = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            addrs = []
        for addr in addrs:
            try:
                return [await self.dial_addr(addr, peer_id)]
            except SwarmException as error:
                log.debug("dialling %s failed: %s", addr, error)
        raise SwarmException(f"No address of peer {peer_id} answers.")

    async def dial_addr(
        self, addr: Multiaddr, peer_id: ID, source: tuple[str, int] | None = None
    ) -> INetConn:
        """Connect to one address. ``source`` is for hole punching, which is not built yet."""
        try:
            return await self.dial(addr, peer_id)
        except Exception as error:
            raise SwarmException(in_words(error)) from error

    async def notify_disconnected(self, conn: INetConn) -> None:
        """Tell the notifees, and dial nobody in return."""
        await self._notify("disconnected", conn)


async def _answer_with(pipe: Pipe, protocol: str) -> None:
    await answer(pipe, (protocol,))


@asynccontextmanager
async def run_swarm(key_pair: KeyPair, transport: Transport = TCP) -> AsyncIterator[Swarm]:
    """A running swarm. Leaving it says goodbye to every peer and ends every task."""
    async with trio.open_nursery() as nursery:
        swarm = Swarm(key_pair, nursery, transport)
        try:
            yield swarm
        finally:
            with trio.CancelScope(shield=True):
                await swarm.close()
            nursery.cancel_scope.cancel()
