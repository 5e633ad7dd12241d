"""No error of libp2p, trio or the operating system leaves p2p under its own name."""

import errno

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.exceptions import SwarmException
from libp2p.security.noise.exceptions import InvalidSignature, PeerIDMismatchesPubkey
from multiaddr import Multiaddr

from petalnode.errors import ListenError, PeerGone, PeerUnreachable, PetalnodeError, UsageError
from petalnode.p2p import swarm
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import new_identity
from petalnode.p2p.translate import cannot_listen, collapsed, in_words, parse_addr

PEER = new_identity(b"p" * 32).peer_id


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ECONNREFUSED, "Connection refused"), "connection refused"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no route to host"),
        (trio.TooSlowError(), "no answer in time"),
        (PeerIDMismatchesPubkey(), "another peer answers there"),
        (InvalidSignature(), "it could not prove its identity"),
        (PeerGone("The peer hung up."), "The peer hung up"),
        (BaseLibp2pError(), "the handshake failed (BaseLibp2pError)"),
        (ExceptionGroup("", [OSError(errno.EPIPE, "Broken pipe")]), "broken pipe"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
async def test_whatever_a_dial_raises_is_unreachable_in_words(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: object) -> None:
        raise error

    assert in_words(error) == words
    async with open_host(new_identity(), listen=[]) as host:
        monkeypatch.setattr(swarm.Swarm, "dial", failing)
        host.learn(PEER, ["/ip4/192.0.2.1/tcp/4001"])
        for attempt in (reach_by_address, reach_by_stream):
            with pytest.raises(PeerUnreachable) as unreachable:
                await attempt(host)
            assert words in unreachable.value.cause
            assert "/ip4/192.0.2.1/tcp/4001" in unreachable.value.cause
            assert unreachable.value.remedy


async def reach_by_address(host: Host) -> None:
    await host.connect(f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}")


async def reach_by_stream(host: Host) -> None:
    await host.open_stream(PEER, "/test/1")


async def test_libp2p_services_get_libp2p_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_host(new_identity(), listen=[]) as host:
        network = host.libp2p.get_network()
        with pytest.raises(SwarmException, match="connection refused"):
            await network.dial_addr(Multiaddr("/ip4/127.0.0.1/tcp/1"), host.libp2p.get_id())
        with pytest.raises(SwarmException, match="No address"):
            await network.new_stream(host.libp2p.get_id())


@pytest.mark.parametrize("code", [errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL])
def test_listening_failures_say_what_to_do(code: int) -> None:
    error = cannot_listen("/ip4/0.0.0.0/tcp/80", 80, OSError(code, "as the system says"))
    assert isinstance(error, ListenError)
    assert error.cause
    assert error.remedy


@pytest.mark.parametrize(
    "text",
    ["", "/", "hello", "/ip4/1.2.3.4", "/ip4/300.1.1.1/tcp/1", "/ip4/1.2.3.4/tcp/99999", "/tcp/1",
     "/ip4/1.2.3.4/tcp/1/ws", "/ip4/1.2.3.4/tcp/1/p2p/notapeer", "/unix/tmp/x", "\x00"],
)  # fmt: skip
def test_what_is_no_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address") as error:
        parse_addr(text)
    assert isinstance(error.value, PetalnodeError)
    assert "/ip4/" in error.value.remedy


@pytest.mark.parametrize("host", ["ip4/192.0.2.1", "ip6/2001:db8::1", "dns4/node.example"])
def test_addresses_may_name_a_peer_or_not(host: str) -> None:
    assert parse_addr(f"/{host}/tcp/4001")[1] is None
    assert str(parse_addr(f"/{host}/tcp/4001/p2p/{PEER}")[1]) == PEER


def test_only_a_single_error_is_taken_out_of_its_group() -> None:
    with pytest.raises(KeyError), collapsed():
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [KeyError("one")])])
    with pytest.raises(ExceptionGroup), collapsed():
        raise ExceptionGroup("outer", [KeyError("one"), KeyError("two")])
