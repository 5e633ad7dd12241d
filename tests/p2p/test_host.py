"""Real hosts on loopback: reaching each other, and what must not go wrong (facts.md, first table).

Each fault named in a docstring was reproduced with py-libp2p 0.8.1's own host.
"""

import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import torch
import trio
import trio.testing
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol

from petalnode.errors import (
    ListenError,
    LocalProtocolError,
    PeerGone,
    PeerRefused,
    PeerUnreachable,
    UsageError,
)
from petalnode.p2p import swarm, yamux
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import new_identity

from .muxers import DEADLINE_S, STILL_S, cancelled

ANY = "/ip4/127.0.0.1/tcp/0"
ECHO = "/test/echo/1"


async def echo(stream: FrameStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame.header, frame.tensors)


@asynccontextmanager
async def open_hosts(count: int = 2) -> AsyncIterator[list[Host]]:
    async with AsyncExitStack() as stack:
        hosts = []
        for number in range(count):
            identity = new_identity(bytes([number + 1]) * 32)
            host = await stack.enter_async_context(open_host(identity, listen=[ANY]))
            host.serve(ECHO, echo)
            hosts.append(host)
        yield hosts


async def assert_echoes(stream: FrameStream, word: str = "hello") -> None:
    with trio.fail_after(DEADLINE_S):
        await stream.send({"word": word})
        answer = await stream.receive()
    assert answer is not None
    assert answer.header == {"word": word}


async def until(condition: object) -> None:
    assert callable(condition)
    with trio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is awaited gives no sign
            await trio.sleep(0.005)


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def port_of(host: Host) -> int:
    return int(host.addrs[0].split("/")[4])


async def test_two_hosts_exchange_frames() -> None:
    async with open_hosts() as (alice, bob):
        assert await alice.connect(bob.addrs[0]) == bob.peer_id
        assert alice.connected_peers() == [bob.peer_id]
        stream = await alice.open_stream(bob.peer_id, ECHO)
        x_TD = torch.arange(600_000, dtype=torch.float32).view(600, 1000)
        await stream.send({"n": 1}, [x_TD])
        answer = await stream.receive()
        assert answer is not None
        assert torch.equal(answer.tensors[0], x_TD)
        await stream.aclose()
        assert await stream.receive() is None
        assert await alice.ping(bob.peer_id) > 0
        assert (alice.rtt_s(bob.peer_id) or 0) > 0
        assert alice.rtt_s(new_identity(b"x" * 32).peer_id) is None


async def test_a_learned_address_is_dialled_when_a_stream_is_wanted() -> None:
    async with open_hosts() as (alice, bob):
        dead = f"/ip4/127.0.0.1/tcp/1/p2p/{bob.peer_id}"
        alice.learn(bob.peer_id, [dead, "nonsense", *bob.addrs])
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(alice.open_stream, bob.peer_id, ECHO)
        await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))
        assert len(bob.libp2p.get_network().get_connections()) == 1


async def test_an_address_without_a_peer_id_finds_it_out() -> None:
    async with open_hosts() as (alice, bob):
        assert await alice.connect(bob.addrs[0].split("/p2p/")[0]) == bob.peer_id


async def test_a_failed_peer_is_not_shut_out() -> None:
    """Stock ``host.connect`` refuses for 60 s after a failure."""
    async with open_hosts() as (alice, bob):
        with pytest.raises(PeerUnreachable, match="connection refused"):
            await alice.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{bob.peer_id}")
        for _ in range(5):
            await alice.connect(bob.addrs[0])
            await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))
            alice.close_peer(bob.peer_id)


async def test_each_way_to_be_unreachable_is_said_in_words() -> None:
    stranger = new_identity(b"s" * 32).peer_id
    async with open_hosts() as (alice, bob):
        address = bob.addrs[0].split("/p2p/")[0]
        with pytest.raises(PeerUnreachable, match="another peer answers there"):
            await alice.connect(f"{address}/p2p/{stranger}")
        with pytest.raises(PeerUnreachable, match="No address of peer"):
            await alice.open_stream(stranger, ECHO)
        with pytest.raises(PeerUnreachable, match="own"):
            await alice.connect(alice.addrs[0])
        with pytest.raises(UsageError, match="is not an address"):
            await alice.connect("example.org:4001")
        with pytest.raises(UsageError, match="is not an address"):
            await alice.connect(f"/ip4/127.0.0.1/udp/4001/quic-v1/p2p/{bob.peer_id}")
        await alice.connect(bob.addrs[0])
        with pytest.raises(PeerRefused, match="does not speak /test/none") as refused:
            await alice.open_stream(bob.peer_id, "/test/none")
        assert refused.value.code == "protocol"


async def test_a_mute_listener_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "DIAL_DEADLINE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with open_hosts(1) as (alice,):
            with pytest.raises(PeerUnreachable, match="no answer in time"):
                await alice.connect(f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}")


async def test_a_port_in_use_is_named() -> None:
    """The stock listener sets SO_REUSEPORT: two nodes would share the port."""
    async with open_hosts(1) as (alice,):
        taken = f"/ip4/127.0.0.1/tcp/{port_of(alice)}"
        with pytest.raises(ListenError, match=f"Port {port_of(alice)} .* already in use"):
            async with open_host(new_identity(), listen=[taken]):
                pass
        with pytest.raises(ListenError, match="Cannot listen"):
            async with open_host(new_identity(), listen=["/ip4/192.0.2.77/tcp/0"]):
                pass


async def test_addresses_are_such_as_others_can_dial() -> None:
    announced = "/dns4/node.example/tcp/4001"
    async with open_host(
        new_identity(), listen=["/ip4/0.0.0.0/tcp/0"], announce=[announced]
    ) as host:
        assert host.addrs[0] == f"{announced}/p2p/{host.peer_id}"
        assert "/127.0.0.1/" in host.addrs[-1]
        assert not any("/0.0.0.0/" in addr or "/tcp/0/" in addr for addr in host.addrs)


async def test_an_exception_in_a_handler_costs_its_stream_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stock: every stream of that connection is reset, and the zombie looks connected."""

    async def faulty(stream: FrameStream) -> None:
        await stream.receive()
        raise RuntimeError("a bug in a handler")

    async with open_hosts() as (alice, bob):
        bob.serve("/test/faulty/1", faulty)
        await alice.connect(bob.addrs[0])
        healthy = await alice.open_stream(bob.peer_id, ECHO)
        doomed = await alice.open_stream(bob.peer_id, "/test/faulty/1")
        with caplog.at_level(logging.CRITICAL, "petalnode.p2p"):
            await doomed.send({})
            with pytest.raises(PeerGone, match="reset"):
                await doomed.receive()
        await assert_echoes(healthy)
        await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))
        assert len(bob.libp2p.get_network().get_connections()) == 1


async def test_a_cancelled_write_costs_its_stream_alone() -> None:
    """Stock: the Noise session is lost, and with it the connection."""

    async def never_read(stream: FrameStream) -> None:
        await trio.sleep_forever()

    async with open_hosts() as (alice, bob):
        bob.serve("/test/deaf/1", never_read)
        await alice.connect(bob.addrs[0])
        healthy = await alice.open_stream(bob.peer_id, ECHO)
        blocked = await alice.open_stream(bob.peer_id, "/test/deaf/1")
        await cancelled(blocked.send, {}, [torch.zeros(4_000_000)])
        with pytest.raises(PeerGone):
            await blocked.send({})
        await assert_echoes(healthy)


async def test_the_257th_stream_raises() -> None:
    async with open_hosts() as (alice, bob):
        await alice.connect(bob.addrs[0])
        for _ in range(yamux.MAX_STREAMS_EACH_WAY):
            await alice.open_stream(bob.peer_id, ECHO)
        with pytest.raises(LocalProtocolError, match="256 streams"):
            await alice.open_stream(bob.peer_id, ECHO)


async def test_a_listener_outlives_300_connections_and_leaks_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stock: deaf after 250 inbound connections in its life, one task leaked for each."""
    monkeypatch.setattr(swarm, "MAX_CONNECTIONS", 100)
    async with open_hosts(1) as (bob,):
        before = tasks()

        async def dial(number: int) -> None:
            identity = new_identity(number.to_bytes(32, "big"))
            async with open_host(identity, listen=[]) as dialler:
                await dialler.connect(bob.addrs[0])

        for first in range(1, 301, 20):
            async with trio.open_nursery() as nursery:
                for number in range(first, first + 20):
                    nursery.start_soon(dial, number)
        await until(lambda: tasks() <= before)
        async with open_host(new_identity(), listen=[]) as dialler:
            await dialler.connect(bob.addrs[0])
            await assert_echoes(await dialler.open_stream(bob.peer_id, ECHO))


@pytest.mark.parametrize("silent", [300, swarm.MAX_HANDSHAKES + 20])
async def test_honest_dials_get_through_beside_silent_connections(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock: 250 slots, so 300 silent connections lock everyone out until they are given up."""
    monkeypatch.setattr(swarm, "HANDSHAKE_DEADLINE_S", 10 * DEADLINE_S)
    monkeypatch.setattr(swarm, "DIAL_DEADLINE_S", DEADLINE_S)
    async with open_hosts() as (alice, bob):
        with contextlib.ExitStack() as stack:
            for _ in range(silent):
                stack.enter_context(socket.create_connection(("127.0.0.1", port_of(bob))))
            with trio.fail_after(DEADLINE_S):
                await alice.connect(bob.addrs[0])
                await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))


async def test_a_silent_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "HANDSHAKE_DEADLINE_S", 0.1)
    async with open_hosts(1) as (bob,):
        before = tasks()
        sock = await trio.open_tcp_stream("127.0.0.1", port_of(bob))
        async with sock:
            with trio.fail_after(DEADLINE_S):
                async for _ in sock:
                    pass  # it names its protocol first
        await until(lambda: tasks() <= before)


async def test_garbage_instead_of_a_handshake_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swarm, "HANDSHAKE_DEADLINE_S", 0.1)
    async with open_hosts() as (alice, bob):
        noise = b"\x13/multistream/1.0.0\n\x07/noise\n"
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", noise + b"\x00\x05hello", b"\xff" * 99):
            sock = await trio.open_tcp_stream("127.0.0.1", port_of(bob))
            async with sock:
                with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(DEADLINE_S):
                    await sock.send_all(garbage)
                    async for _ in sock:
                        pass
        monkeypatch.undo()
        await alice.connect(bob.addrs[0])
        await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))


async def test_nobody_is_dialled_unasked() -> None:
    """Stock: the connection manager dials known peers by itself, up to 100 of them."""
    async with open_hosts(3) as (alice, bob, carol):
        known = alice.libp2p.get_peerstore()
        network = carol.libp2p.get_network()
        known.add_addrs(carol.libp2p.get_id(), list(carol.libp2p.get_addrs()), 600)
        alice.learn(carol.peer_id, carol.addrs)
        await alice.connect(bob.addrs[0])
        await alice.libp2p.disconnect(bob.libp2p.get_id())
        await until(lambda: not alice.connected_peers())
        await trio.sleep(0.05)
        assert not alice.connected_peers()
        assert not network.get_connections()


async def test_a_lost_connection_is_told_and_can_be_made_anew() -> None:
    async with open_hosts() as (alice, bob):
        gone: list[str] = []
        alice.on_disconnect(gone.append)
        await alice.connect(bob.addrs[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await bob.libp2p.disconnect(alice.libp2p.get_id())
        with pytest.raises(PeerGone):
            await stream.receive()
        await until(lambda: gone == [bob.peer_id])
        await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))


async def test_what_was_closed_for_idleness_just_now_is_no_failure() -> None:
    """The goodbye crosses the first bytes of whoever wants something again."""
    async with open_hosts() as (alice, bob):
        broken: list[str] = []
        for host in (alice, bob):
            host.on_disconnect(broken.append, goodbye=False)
        for again in range(5):
            await alice.connect(bob.addrs[0])
            await until(lambda: bob.connected_peers())
            bob.close_peer(alice.peer_id)
            if again % 2:
                assert await alice.ping(bob.peer_id) > 0
            else:
                await assert_echoes(await alice.open_stream(bob.peer_id, ECHO))
        assert not broken


async def test_a_connection_is_in_use_while_a_stream_of_ours_is_open() -> None:
    async with open_hosts() as (alice, bob):
        assert not alice.is_in_use(bob.peer_id)
        await alice.connect(bob.addrs[0])
        await until(lambda: bob.connected_peers())
        assert not alice.is_in_use(bob.peer_id)
        stream = await alice.open_stream(bob.peer_id, ECHO)
        assert alice.is_in_use(bob.peer_id)
        assert bob.is_in_use(alice.peer_id)
        await stream.aclose()
        stream.reset()
        await until(lambda: not alice.is_in_use(bob.peer_id))
        await until(lambda: not bob.is_in_use(alice.peer_id))


async def test_streams_of_libp2ps_services_are_no_use_of_a_connection() -> None:
    async with open_hosts() as (alice, bob):
        held = trio.Event()

        async def hold(stream: INetStream) -> None:
            held.set()
            await stream.read(1)

        bob.libp2p.set_stream_handler(TProtocol("/test/service/1"), hold)
        await alice.connect(bob.addrs[0])
        await alice.libp2p.new_stream(bob.libp2p.get_id(), [TProtocol("/test/service/1")])
        await held.wait()
        assert not alice.is_in_use(bob.peer_id)
        assert not bob.is_in_use(alice.peer_id)


async def test_a_connection_that_breaks_is_told_apart_from_a_goodbye() -> None:
    async with open_hosts() as (alice, bob):
        ended: list[str] = []
        alice.on_disconnect(lambda _: ended.append("goodbye"), goodbye=True)
        alice.on_disconnect(lambda _: ended.append("broken"), goodbye=False)
        await alice.connect(bob.addrs[0])
        await until(lambda: bob.connected_peers())
        (connection,) = bob.libp2p.get_network().get_connections(alice.libp2p.get_id())
        connection.muxer.session.close()  # as when its process is killed
        await until(lambda: ended == ["broken"])
        await alice.connect(bob.addrs[0])
        await until(lambda: alice.peer_id in bob.connected_peers())
        alice.close_peer(bob.peer_id)
        await until(lambda: ended == ["broken", "goodbye"])


async def test_leaving_leaves_nothing() -> None:
    async with open_hosts(1) as (bob,):
        before = tasks()
        peers = [new_identity(bytes([9, n]) * 16) for n in range(20)]
        async with AsyncExitStack() as stack:
            for identity in peers:
                host = await stack.enter_async_context(open_host(identity, listen=[ANY]))
                await host.connect(bob.addrs[0])
                await host.open_stream(bob.peer_id, ECHO)
        await until(lambda: tasks() <= before)
        assert not bob.connected_peers()


async def test_an_error_inside_comes_out_by_itself() -> None:
    with pytest.raises(KeyError, match="the caller's own"):
        async with open_host(new_identity(), listen=[]):
            raise KeyError("the caller's own")


async def test_an_idle_host_is_small_and_still() -> None:
    async with open_hosts() as (alice, bob):
        before = tasks()
        await alice.connect(bob.addrs[0])
        await until(lambda: bob.connected_peers())
        await trio.testing.wait_all_tasks_blocked(STILL_S)
        # Each side: serve, read, write, keep alive (and libp2p's notifees are done).
        assert tasks() - before <= 8
