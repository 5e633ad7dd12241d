"""A libp2p host: petalnode's end of the wire.

``open_host`` listens, ``Host.connect`` and ``Host.open_stream`` reach others, ``Host.serve``
answers them. Streams are ``FrameStream``s; errors are petalnode's. ``Host.libp2p`` is the raw
libp2p host, for libp2p's own services (gossip) and nobody else.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import trio
from libp2p.abc import IHost
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.utils import get_thin_waist_addresses

from petalnode.errors import PeerGone, PeerUnreachable
from petalnode.p2p.frames import ByteStream, FrameStream
from petalnode.p2p.identity import Identity, is_peer_id
from petalnode.p2p.negotiate import propose
from petalnode.p2p.swarm import Connection, Swarm, run_swarm
from petalnode.p2p.translate import (
    cannot_listen,
    collapsed,
    dial_target,
    parse_addr,
    unreachable,
)
from petalnode.p2p.wire import TCP, Transport
from petalnode.p2p.yamux_stream import Stream

OPEN_DEADLINE_S = 10.0
PING_DEADLINE_S = 5.0
# How long one address of a peer is tried alone before the next is tried beside it.
STAGGER_S = 0.25
MAX_ADDRS_PER_PEER = 16
MAX_KNOWN_PEERS = 8192

# Importing libp2p leaves its logger without a handler, so that Python prints all its complaints.
logging.getLogger("libp2p").addHandler(logging.NullHandler())

FrameHandler = Callable[[FrameStream], Awaitable[None]]
Tap = Callable[[ByteStream, str], ByteStream]
"""What is put around each stream of a protocol of ours: a simulator counts its bytes."""


def untapped(stream: ByteStream, _protocol: str) -> ByteStream:
    """The stream as it is."""
    return stream


class QuietHost(BasicHost):
    """libp2p's host for libp2p's services. Answers identify, but asks nobody by itself."""

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Not done: what peers are we learn from signed announcements."""


class Host:
    """One node's end of the wire. Made by ``open_host``. Every peer id is base58 text."""

    def __init__(
        self, peer_id: str, swarm: Swarm, addrs: tuple[str, ...], tap: Tap = untapped
    ) -> None:
        self.peer_id = peer_id
        self.addrs = addrs
        self._tap = tap
        libp2p_host = QuietHost(swarm)
        self.libp2p: IHost = libp2p_host
        self._swarm = swarm
        self._known: dict[str, tuple[str, ...]] = {}
        self._dialling: dict[str, trio.Lock] = {}
        self._on_disconnect: list[tuple[Callable[[str], None], bool | None]] = []
        swarm.libp2p_handlers = libp2p_host.multiselect.handlers
        swarm.on_disconnected = self._disconnected

    # Reaching others

    async def connect(self, addr: str) -> str:
        """Connect to the peer at a multiaddr and return its id, which the address may leave out.

        Raises UsageError for a malformed address, PeerUnreachable.
        """
        parsed, expected = parse_addr(addr)
        if expected is not None and str(expected) == self.peer_id:
            raise PeerUnreachable("That address is this node's own.", "", self.peer_id)
        if expected is not None and self._swarm.connection(expected):
            return str(expected)
        try:
            connection = await self._swarm.dial(parsed, expected)
        except Exception as error:
            raise unreachable(str(expected or ""), {addr: error}) from error
        peer_id = connection.muxer.peer_id
        self.learn(peer_id, (addr,))
        return peer_id

    def learn(self, peer_id: str, addrs: Sequence[str]) -> None:
        """Remember where a peer can be dialled; the newest first, malformed ones left out."""
        kept = [addr for addr in addrs if _is_dialable(addr)]
        kept += [addr for addr in self._known.pop(peer_id, ()) if addr not in kept]
        self._known[peer_id] = tuple(kept[:MAX_ADDRS_PER_PEER])
        if len(self._known) > MAX_KNOWN_PEERS:
            del self._known[next(iter(self._known))]

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A new stream to a peer, which is dialled at what we know when not connected.

        Raises PeerUnreachable, PeerGone, PeerRefused (it does not speak ``protocol``), and
        LocalProtocolError when too many streams to it are open.
        """
        connection = await self._connection(peer_id)
        try:
            return await self._open_on(connection, protocol)
        except PeerGone:
            if not connection.muxer.said_goodbye:
                raise
        # It closed a connection that was idle until now; nothing is wrong with the peer.
        return await self._open_on(await self._connection(peer_id), protocol)

    async def _open_on(self, connection: Connection, protocol: str) -> FrameStream:
        peer_id = connection.muxer.peer_id
        stream = connection.muxer.open_stream()
        try:
            with trio.fail_after(OPEN_DEADLINE_S):
                await propose(stream, protocol)
        except BaseException as error:
            stream.reset()
            if isinstance(error, trio.TooSlowError):
                raise PeerGone(
                    f"Peer {peer_id} did not answer a new stream within {OPEN_DEADLINE_S:.0f} s.",
                    peer_id=peer_id,
                ) from None
            raise
        return FrameStream(self._tap(stream, protocol))

    async def _connection(self, peer_id: str) -> Connection:
        if not is_peer_id(peer_id):
            raise PeerUnreachable("What was given is not the id of a peer.", "", peer_id)
        wanted = ID.from_string(peer_id)
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            connection = self._swarm.connection(wanted)
            if connection is None:
                async with lock:
                    connection = self._swarm.connection(wanted)
                    connection = connection or await self._dial_known(peer_id, wanted)
            return connection
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._dialling.pop(peer_id, None)

    async def _dial_known(self, peer_id: str, wanted: ID) -> Connection:
        """Race the known addresses, each with a head start on the next."""
        tried: dict[str, BaseException] = {}
        won: list[Connection] = []
        async with trio.open_nursery() as nursery:

            async def attempt(addr: str, over: trio.Event) -> None:
                try:
                    won.append(await self._swarm.dial(Multiaddr(addr), wanted))
                    nursery.cancel_scope.cancel()
                except Exception as error:  # noqa: BLE001 - libp2p's errors end here
                    tried[addr] = error
                over.set()

            for addr in self._known.get(peer_id, ()):
                over = trio.Event()
                nursery.start_soon(attempt, addr, over)
                with trio.move_on_after(STAGGER_S):
                    await over.wait()
        if not won:
            raise unreachable(peer_id, tried)
        return won[0]

    async def ping(self, peer_id: str) -> float:
        """One round trip now, in seconds; dials the peer when not connected.

        Raises PeerUnreachable and PeerGone.
        """
        connection = await self._connection(peer_id)
        try:
            return await _ping_on(connection)
        except PeerGone:
            if not connection.muxer.said_goodbye:
                raise
        return await _ping_on(await self._connection(peer_id))

    def rtt_s(self, peer_id: str) -> float | None:
        """The least round trip measured lately, in seconds; None while unknown."""
        connection = self._swarm.connection(ID.from_string(peer_id))
        return connection.muxer.rtt_s if connection else None

    # Answering others

    def serve(self, protocol: str, handler: FrameHandler) -> None:
        """Run ``handler`` with each stream that a peer opens for ``protocol``.

        The stream is ended when the handler returns and reset when it raises.
        """

        async def handle(stream: Stream) -> None:
            await handler(FrameStream(self._tap(stream, protocol)))

        self._swarm.handlers[protocol] = handle

    def connected_peers(self) -> list[str]:
        """Who is connected now."""
        return [str(peer_id) for peer_id in self._swarm.connections]

    def is_in_use(self, peer_id: str) -> bool:
        """Whether a stream of ours is open to or from a peer; gossip's do not count."""
        held = self._swarm.connections.get(ID.from_string(peer_id), ())
        return any(cast(Connection, connection).is_in_use for connection in held)

    def close_peer(self, peer_id: str) -> None:
        """Say goodbye on all connections to a peer. It may be dialled again at any time."""
        for connection in self._swarm.connections.get(ID.from_string(peer_id), ()):
            cast(Connection, connection).muxer.close()

    def on_disconnect(
        self, callback: Callable[[str], None], *, goodbye: bool | None = None
    ) -> None:
        """Call ``callback(peer_id)`` whenever the last connection to a peer has ended.

        ``goodbye`` True: only where either side closed it; False: only where it broke.
        """
        self._on_disconnect.append((callback, goodbye))

    def _disconnected(self, peer_id: str, goodbye: bool) -> None:
        for callback, wanted in self._on_disconnect:
            if wanted in (None, goodbye):
                callback(peer_id)


async def _ping_on(connection: Connection) -> float:
    peer_id = connection.muxer.peer_id
    try:
        with trio.fail_after(PING_DEADLINE_S):
            return await connection.muxer.ping()
    except trio.TooSlowError:
        raise PeerGone(f"Peer {peer_id} did not answer a ping.", peer_id=peer_id) from None


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    transport: Transport = TCP,
    tap: Tap = untapped,
) -> AsyncIterator[Host]:
    """A running host. ``listen`` are multiaddrs (port 0: any), ``announce`` further addresses
    under which others reach it. Leaving says goodbye to every peer.

    Raises ListenError, and UsageError for a malformed address.
    """
    with collapsed():
        async with run_swarm(identity.key_pair, transport) as swarm:
            bound = [_bind(swarm, addr) for addr in listen]
            addrs = _full_addrs(identity.peer_id, bound, announce)
            yield Host(identity.peer_id, swarm, addrs, tap)


def _bind(swarm: Swarm, addr: str) -> Multiaddr:
    parsed, _ = parse_addr(addr)
    host, port = dial_target(parsed)
    try:
        return swarm.bind(host, port)
    except OSError as error:
        raise cannot_listen(addr, port, error) from error


def _full_addrs(
    peer_id: str, bound: Sequence[Multiaddr], announce: Sequence[str]
) -> tuple[str, ...]:
    """What others can dial: announced first, then real interfaces, loopback last."""
    hosts = [(host, port) for addr in bound for host, port in _expand(*dial_target(addr))]
    hosts.sort(key=lambda pair: ipaddress.ip_address(pair[0]).is_loopback)
    texts = [str(parse_addr(addr)[0]).split("/p2p/")[0] for addr in announce]
    texts += [f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}" for host, port in hosts]
    return tuple(f"{text}/p2p/{peer_id}" for text in dict.fromkeys(texts))


def _expand(host: str, port: int) -> list[tuple[str, int]]:
    """A bound address as addresses that can be dialled: 0.0.0.0 is every interface."""
    if not ipaddress.ip_address(host).is_unspecified:
        return [(host, port)]
    version, loopback = (6, "::1") if ":" in host else (4, "127.0.0.1")
    outward = get_thin_waist_addresses(Multiaddr(f"/ip{version}/{host}/tcp/{port}"))
    return [*(dial_target(addr) for addr in outward), (loopback, port)]


def _is_dialable(addr: str) -> bool:
    try:
        dial_target(Multiaddr(addr))
    except Exception:  # noqa: BLE001 - whatever the parser raises, it is not an address
        return False
    return True
