"""Only Noise is spoken, and only what the peer sealed is accepted."""

import gc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.security.secio import transport as secio
from multiaddr import Multiaddr

from petalnode.errors import PeerGone, PeerMisbehaved, PeerRefused, PeerUnreachable
from petalnode.p2p.frames import FrameStream, encode
from petalnode.p2p.host import open_host
from petalnode.p2p.identity import new_identity
from petalnode.p2p.memory_wire import memory_wire_pair
from petalnode.p2p.negotiate import propose
from petalnode.p2p.noise import MAX_PLAIN_BYTES, NoiseSecurity, NoiseSession, RawPipe
from petalnode.p2p.swarm import NOISE_PROTOCOL
from petalnode.p2p.wire import dial_tcp

from .muxers import DEADLINE_S, session_pair

INSECURE = ["plaintext", "secio"]


def security_options(kind: str, seed: bytes) -> dict[TProtocol, Any]:
    pair = create_new_key_pair(seed)
    if kind == "plaintext":
        return {PLAINTEXT_PROTOCOL_ID: InsecureTransport(pair)}
    if kind == "secio":
        return {TProtocol(secio.ID): secio.Transport(pair)}
    return {TProtocol(NOISE_PROTOCOL): StockNoise(pair, X25519PrivateKey.new())}


@asynccontextmanager
async def open_stock_host(kind: str) -> AsyncIterator[Any]:
    """py-libp2p's own host, speaking nothing but ``kind``."""
    seed = b"p" * 32
    host = new_host(create_new_key_pair(seed), sec_opt=security_options(kind, seed))
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host
    with warnings.catch_warnings():  # stock leaves the sockets of failed dials to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.parametrize("protocol", [str(PLAINTEXT_PROTOCOL_ID), str(secio.ID), "/tls/1.0.0"])
async def test_other_transports_are_refused_as_listener(protocol: str) -> None:
    """Stock accepts plaintext: whoever knows a public key is taken for that peer."""
    async with open_host(new_identity(b"a" * 32), listen=["/ip4/127.0.0.1/tcp/0"]) as ours:
        host, port = ours.addrs[0].split("/")[2:5:2]
        pipe = RawPipe(await dial_tcp(host, int(port)), True)
        with pytest.raises(PeerRefused, match="does not speak"), trio.fail_after(DEADLINE_S):
            await propose(pipe, protocol)
        await pipe.close()
        assert not ours.connected_peers()


@pytest.mark.parametrize("kind", INSECURE)
async def test_insecure_transports_are_refused_as_dialler(kind: str) -> None:
    async with (
        open_host(new_identity(b"a" * 32), listen=[]) as ours,
        open_stock_host(kind) as stock,
    ):
        with pytest.raises(PeerUnreachable, match="does not speak /noise"):
            await ours.connect(str(stock.get_addrs()[0]))
        assert not ours.connected_peers()


async def test_stock_py_libp2p_talks_with_us() -> None:
    """The wire is plain libp2p: its own Noise, its own yamux, frames read by hand."""

    async def echo(stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            await stream.send(frame.header)

    async with open_host(new_identity(b"a" * 32), listen=["/ip4/127.0.0.1/tcp/0"]) as ours:
        ours.serve("/test/echo/1", echo)
        async with open_stock_host("noise") as stock:
            target = info_from_p2p_addr(Multiaddr(ours.addrs[0]))
            await stock.get_network().dial_addr(target.addrs[0], target.peer_id)
            stream = await stock.new_stream(target.peer_id, [TProtocol("/test/echo/1")])
            message = b"".join(encode({"n": 7}, ()))
            with trio.fail_after(DEADLINE_S):
                await stream.write(message)
                answer = b""
                while len(answer) < len(message):
                    answer += await stream.read(len(message) - len(answer))
            assert answer == message
            await stream.close()
            await stock.close()


async def shake_hands(*, expected: Any = None) -> tuple[NoiseSession, NoiseSession]:
    wires = memory_wire_pair()
    alice, bob = (create_new_key_pair(seed * 32) for seed in (b"a", b"b"))
    made: dict[str, NoiseSession] = {}

    async def side(name: str, secure: Callable[[], Awaitable[NoiseSession]]) -> None:
        made[name] = await secure()

    dialler = RawPipe(wires[0], True)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                side, "bob", lambda: NoiseSecurity(bob).secure(RawPipe(wires[1], False))
            )
            try:
                made["alice"] = await NoiseSecurity(alice).secure(dialler, expected)
            except BaseException:
                nursery.cancel_scope.cancel()
                raise
    return made["alice"], made["bob"]


async def test_both_sides_learn_who_the_other_is() -> None:
    alice, bob = await shake_hands()
    assert alice.peer_id == new_identity(b"b" * 32).peer_id
    assert bob.peer_id == new_identity(b"a" * 32).peer_id
    await alice.write(b"over ", b"the wire")
    assert await bob.read_exactly(13) == b"over the wire"
    await bob.write(b"and back")
    assert await alice.read_exactly(8) == b"and back"


async def test_another_peer_than_expected_is_refused() -> None:
    from libp2p.peer.id import ID

    stranger = ID.from_string(new_identity(b"s" * 32).peer_id)
    with pytest.RaisesGroup(PeerIDMismatchesPubkey):
        await shake_hands(expected=stranger)


@pytest.mark.parametrize("spoiled", [2, 20, -1])
async def test_altered_bytes_end_the_session(spoiled: int) -> None:
    alice, bob = session_pair()
    await alice.write(b"some words that matter")
    bob.wire.arrived[spoiled] ^= 1  # type: ignore[attr-defined]
    with pytest.raises(PeerMisbehaved, match="did not encrypt"):
        bob.try_receive()


@pytest.mark.parametrize(
    "message", [b"\x00\x00", b"\x00\x0fshort of a tag!", b"\x00\x10" + bytes(16)]
)
async def test_messages_too_short_to_be_sealed_end_the_session(message: bytes) -> None:
    alice, bob = session_pair()
    alice.wire.try_send(message)
    with pytest.raises(PeerMisbehaved):
        bob.try_receive()


async def test_a_replayed_message_ends_the_session() -> None:
    alice, bob = session_pair()
    await alice.write(b"pay 10")
    sealed = bytes(bob.wire.arrived)  # type: ignore[attr-defined]
    assert bytes(bob.try_receive() or b"") == b"pay 10"
    alice.wire.try_send(sealed)
    with pytest.raises(PeerMisbehaved):
        bob.try_receive()


async def test_every_complete_message_is_opened_at_once_and_the_rest_is_kept() -> None:
    alice, bob = session_pair()
    alice.seal(b"a" * MAX_PLAIN_BYTES)
    alice.seal(b"b")
    alice.push()
    alice.seal(b"c" * 1000)
    alice.push()
    arrived = bob.wire.arrived  # type: ignore[attr-defined]
    late = bytes(arrived[-500:])
    del arrived[-500:]
    assert bytes(bob.try_receive() or b"") == b"a" * MAX_PLAIN_BYTES + b"b"
    assert bob.try_receive() is None
    arrived += late
    assert bytes(bob.try_receive() or b"") == b"c" * 1000


async def test_what_the_kernel_does_not_take_is_sent_later() -> None:
    alice, bob = session_pair(capacity=1000)
    alice.seal(bytes(5000))
    alice.push()
    assert alice.blocked
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.drain)
        while len(received) < 5000:
            received += bob.try_receive() or b""
            await trio.testing.wait_all_tasks_blocked()
    assert not alice.blocked


async def test_the_end_of_the_connection_is_an_error() -> None:
    alice, bob = session_pair()
    alice.close()
    with pytest.raises(PeerGone, match="closed the connection"):
        bob.try_receive()
