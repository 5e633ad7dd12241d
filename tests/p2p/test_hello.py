import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio
from trio.testing import MockClock

from petalnode.errors import PeerGone, PeerMisbehaved, SwarmMismatch
from petalnode.p2p.envelope import MAX_RECORD_BYTES, seal
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.hello import (
    ANSWER_DEADLINE_S,
    ASK_DEADLINE_S,
    HELLO_PROTOCOL,
    MAX_SNAPSHOT_BYTES,
    About,
    Hello,
    ask,
    hello_handler,
)
from petalnode.p2p.memory import memory_byte_pair, memory_frame_pair
from petalnode.routing.view import Sighting

from .records import FINGERPRINT, identity, record

OTHER = "f" * 32
ABOUT = About("home", "demo", FINGERPRINT, 8)
SEALED = [seal(identity(n), record(identity(n))) for n in (1, 2)]
SIGHTINGS = [Sighting(SEALED[0], 0.5), Sighting(SEALED[1], 2.0)]


class Contact:
    """Stands in for a host that is connected to bob, whose answers ``handler`` gives."""

    def __init__(self, nursery: trio.Nursery, handler: Any) -> None:
        self._nursery = nursery
        self._handler = handler

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        assert protocol == HELLO_PROTOCOL
        ours, theirs = memory_frame_pair("alice", peer_id)
        self._nursery.start_soon(self._handler, theirs)
        return ours


@asynccontextmanager
async def contact(handler: Any) -> AsyncIterator[Contact]:
    async with trio.open_nursery() as nursery:
        yield Contact(nursery, handler)
        nursery.cancel_scope.cancel()


def bob(snapshot: Sequence[Sighting] = SIGHTINGS, absorbed: list[Sighting] | None = None) -> Any:
    def absorb(sightings: Iterable[Sighting]) -> int:
        assert absorbed is not None
        absorbed.extend(sightings)
        return 1

    return hello_handler(ABOUT, lambda: snapshot, absorb)


async def test_tells_its_swarm_and_all_it_knows() -> None:
    async with contact(bob()) as host:
        answer = await ask(host, "bob")
    assert answer == Hello("home", "demo", FINGERPRINT, 8, tuple(SIGHTINGS))


async def test_the_record_of_the_asker_is_handed_on() -> None:
    absorbed: list[Sighting] = []
    async with contact(bob(absorbed=absorbed)) as host:
        await ask(host, "bob", network="home", fingerprint=FINGERPRINT, record=SEALED[0])
    assert absorbed == [Sighting(SEALED[0], 0.0)]


async def test_other_weights_under_the_same_name_are_told() -> None:
    async with contact(bob()) as host:
        with pytest.raises(SwarmMismatch) as caught:
            await ask(host, "bob", fingerprint=OTHER)
    assert caught.value.cause == (
        "Peer bob serves 'demo' with other weights: fingerprint 01234567… there, ffffffff… here."
    )
    assert caught.value.remedy


async def test_another_network_is_told() -> None:
    async with contact(bob()) as host:
        with pytest.raises(SwarmMismatch) as caught:
            await ask(host, "bob", network="work", fingerprint=FINGERPRINT)
    assert "another network" in caught.value.cause


@pytest.mark.parametrize("wrong", [{"network": "work"}, {"fingerprint": OTHER}])
async def test_strangers_get_no_records_and_leave_none(wrong: dict[str, str]) -> None:
    absorbed: list[Sighting] = []
    ours, theirs = memory_frame_pair()
    await ours.send({"network": None, "fingerprint": None, "record": SEALED[0]} | wrong)
    await bob(absorbed=absorbed)(theirs)
    assert await ours.receive() is not None
    assert await ours.receive() is None
    assert absorbed == []


async def test_a_large_swarm_comes_in_several_frames() -> None:
    many = [Sighting(bytes(1000), float(n)) for n in range(1000)]
    async with contact(bob(many)) as host:
        answer = await ask(host, "bob")
    assert list(answer.records) == many


async def test_a_snapshot_is_cut_off_where_the_asker_would_refuse_it() -> None:
    count = MAX_SNAPSHOT_BYTES // MAX_RECORD_BYTES
    many = [Sighting(bytes(MAX_RECORD_BYTES), 0.0)] * (count + 10)
    async with contact(bob(many)) as host:
        answer = await ask(host, "bob")
    assert len(answer.records) == count


def answers(*frames: dict[str, Any]) -> Any:
    async def handle(stream: FrameStream) -> None:
        await stream.receive()
        for frame in frames:
            await stream.send(frame)
        await stream.aclose()

    return handle


HONEST = {"network": "home", "model": "demo", "fingerprint": FINGERPRINT, "blocks": 8}


@pytest.mark.parametrize(
    "frames",
    [
        [{}],
        [HONEST | {"model": "\x1b[2J"}],
        [HONEST | {"model": "x" * 257}],
        [HONEST | {"network": 7}],
        [HONEST | {"fingerprint": "abc"}],
        [HONEST | {"blocks": 0}],
        [HONEST | {"blocks": True}],
        [HONEST, {"records": 7, "ages": []}],
        [HONEST, {"records": [SEALED[0]], "ages": []}],
        [HONEST, {"records": [SEALED[0]], "ages": [-1.0]}],
        [HONEST, {"records": [SEALED[0]], "ages": [float("nan")]}],
        [HONEST, {"records": [SEALED[0]], "ages": ["old"]}],
        [HONEST, {"records": ["text"], "ages": [1.0]}],
        [HONEST, {"records": [bytes(MAX_RECORD_BYTES + 1)], "ages": [1.0]}],
        [HONEST, {"records": [], "ages": []}],
        [HONEST, {"records": [b""] * 20_000, "ages": [0.0] * 20_000}],
        [HONEST] + [{"records": [bytes(4000)] * 60, "ages": [0.0] * 60}] * 18,
    ],
)
async def test_an_answer_that_is_garbage_is_blamed_on_the_peer(
    frames: list[dict[str, Any]],
) -> None:
    async with contact(answers(*frames)) as host:
        with pytest.raises(PeerMisbehaved) as caught:
            await ask(host, "bob")
    assert caught.value.peer_id == "bob"


async def test_a_peer_that_hangs_up_is_gone() -> None:
    async with contact(answers()) as host:
        with pytest.raises(PeerGone) as caught:
            await ask(host, "bob")
    assert caught.value.peer_id == "bob"


async def test_a_silent_peer_is_given_up(autojump_clock: MockClock) -> None:
    async def silent(stream: FrameStream) -> None:
        await trio.sleep_forever()

    async with contact(silent) as host:
        before = trio.current_time()
        with pytest.raises(PeerGone):
            await ask(host, "bob")
    assert trio.current_time() - before == pytest.approx(ASK_DEADLINE_S)


async def test_a_silent_asker_loses_its_stream(autojump_clock: MockClock) -> None:
    ours, theirs = memory_frame_pair()
    await bob()(theirs)
    assert trio.current_time() >= ANSWER_DEADLINE_S
    with pytest.raises(PeerGone):
        await ours.receive()


@pytest.mark.parametrize(
    "request_header",
    [
        {"network": 7},
        {"fingerprint": ["x"]},
        {"network": "\x00"},
        {"record": "text"},
        {"record": bytes(MAX_RECORD_BYTES + 1)},
    ],
)
async def test_a_request_that_is_garbage_costs_its_stream_alone(
    request_header: dict[str, Any],
) -> None:
    ours, theirs = memory_frame_pair()
    await ours.send(request_header)
    await bob()(theirs)
    with pytest.raises(PeerGone):
        await ours.receive()


async def test_a_stranger_reserves_no_memory(autojump_clock: MockClock) -> None:
    """A header of a few bytes may not make us set 64 MiB aside for what it promises."""
    raw, theirs = memory_byte_pair()
    handle = hello_handler(About("home", "demo", FINGERPRINT, 8), list, lambda _: 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handle, FrameStream(theirs))
        header = msgpack.packb({"network": None, "_t": [["float32", [1 << 24]]]})
        await raw.write(struct.pack(">II", len(header), 1 << 26) + header)
        with pytest.raises(PeerGone), trio.fail_after(1):
            await raw.read_exactly(1)


async def test_bytes_that_are_no_frame_cost_their_stream_alone() -> None:
    ours, theirs = memory_byte_pair()
    await ours.write(b"\xff" * 64)
    await bob()(FrameStream(theirs))
    with pytest.raises(PeerGone):
        await ours.read_exactly(1)


async def test_a_request_from_a_newer_version_is_understood() -> None:
    ours, theirs = memory_frame_pair()
    await ours.send({"colour": "blue"})
    await bob()(theirs)
    frame = await ours.receive()
    assert frame is not None
    assert frame.header == HONEST
