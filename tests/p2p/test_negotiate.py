"""multistream-select over memory streams."""

import pytest
import trio

from petalnode.errors import PeerGone, PeerMisbehaved, PeerRefused
from petalnode.p2p.memory import memory_byte_pair
from petalnode.p2p.negotiate import HELLO, MAX_PROPOSALS, answer, pack, propose


async def test_both_agree_in_one_round_trip() -> None:
    alice, bob = memory_byte_pair()
    await bob.write(pack(HELLO), pack("/a/1"))
    await propose(alice, "/a/1")
    assert await answer(bob, {"/a/1", "/b/1"}) == "/a/1"


async def test_an_unknown_protocol_is_refused_and_another_may_be_proposed() -> None:
    alice, bob = memory_byte_pair()
    chosen: list[str] = []

    async def respond() -> None:
        chosen.append(await answer(bob, {"/b/1"}))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        with pytest.raises(PeerRefused, match="does not speak /a/1"):
            await propose(alice, "/a/1")
        await alice.write(pack("/b/1"))
    assert chosen == ["/b/1"]


async def test_a_long_name_takes_two_length_bytes() -> None:
    alice, bob = memory_byte_pair()
    name = "/" + "x" * 300
    await bob.write(pack(HELLO), pack(name))
    await propose(alice, name)
    assert await answer(bob, {name}) == name


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x05GET /", id="no end"),
        pytest.param(b"\x00", id="empty"),
        pytest.param(b"\xff\xff", id="too long"),
        pytest.param(b"\x03\xff\xfe\n", id="not text"),
        pytest.param(pack("/multistream/2.0.0"), id="another greeting"),
        pytest.param(pack(HELLO) + pack("/other"), id="another answer"),
    ],
)
async def test_garbage_is_named(garbage: bytes) -> None:
    alice, bob = memory_byte_pair()
    await bob.write(garbage)
    with pytest.raises(PeerMisbehaved):
        await propose(alice, "/a/1")


async def test_proposals_end() -> None:
    alice, bob = memory_byte_pair()
    await alice.write(pack(HELLO), *[pack("/no")] * (MAX_PROPOSALS + 1))
    with pytest.raises(PeerMisbehaved, match="without end"):
        await answer(bob, {"/a/1"})


async def test_a_peer_that_leaves_is_gone() -> None:
    alice, bob = memory_byte_pair()
    await bob.write(pack(HELLO)[:5])
    await bob.close_write()
    with pytest.raises(PeerGone):
        await propose(alice, "/a/1")
