"""The muxer against itself and against scripts that break the rules."""

import math

import pytest
import trio
import trio.testing

from petalnode.errors import LocalProtocolError, PeerGone, PeerMisbehaved
from petalnode.p2p import yamux, yamux_stream
from petalnode.p2p.yamux_frames import (
    ACK,
    DATA,
    FIN,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
)
from petalnode.p2p.yamux_stream import INITIAL_WINDOW_BYTES

from .muxers import (
    DEADLINE_S,
    cancelled,
    frame,
    open_against_script,
    open_muxers,
    stream_pair,
)

MIB = 1024 * 1024


@pytest.mark.parametrize("size", [1, 65_507, 65_508, 300_000, 3 * MIB])
async def test_bytes_arrive_as_they_were_sent(size: int) -> None:
    data = bytes(range(256)) * math.ceil(size / 256)
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.write, b"head", memoryview(data)[:size], b"", b"tail")
            assert await theirs.read_exactly(4) == b"head"
            assert await theirs.read_exactly(size) == data[:size]
            assert await theirs.read_exactly(4) == b"tail"
        await theirs.write(b"back")
        assert await mine.read_start(4) == b"back"


async def test_messages_of_many_writers_do_not_mix() -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        async with trio.open_nursery() as nursery:
            for letter in b"abcdefgh":
                nursery.start_soon(mine.write, bytes([letter]) * 100_000, bytes([letter]) * 100_000)
            runs = {bytes(await theirs.read_exactly(200_000)) for _ in range(8)}
        assert runs == {bytes([letter]) * 200_000 for letter in b"abcdefgh"}


async def test_an_end_between_messages_is_clean_and_one_inside_is_not() -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(b"1234567")
        await mine.close_write()
        assert await theirs.read_start(4) == b"1234"
        with pytest.raises(PeerGone):
            await theirs.read_start(4)
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(b"1234")
        await mine.close_write()
        assert await theirs.read_exactly(4) == b"1234"
        assert await theirs.read_start(4) is None
        await theirs.write(b"still open this way")
        assert await mine.read_exactly(5) == b"still"


@pytest.mark.parametrize("read", ["read_exactly", "read_start"])
async def test_a_killed_peer_is_never_a_clean_end(read: str) -> None:
    """Stock py-libp2p reports the end of the connection as the end of the stream."""
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(b"12")
        assert await theirs.read_exactly(2) == b"12"
        alice.wire.close()
        with pytest.raises(PeerGone, match="closed the connection"):
            await getattr(theirs, read)(4)
        with pytest.raises(PeerGone):
            await theirs.write(b"x")


async def test_a_cancelled_write_resets_its_stream_alone() -> None:
    """Stock py-libp2p loses the Noise session, and every stream with it."""
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        other, others = await stream_pair(alice, bob)
        await cancelled(mine.write, bytes(4 * INITIAL_WINDOW_BYTES))
        with pytest.raises(PeerGone):
            await mine.write(b"more")
        with pytest.raises(PeerGone, match="reset"):
            await theirs.read_exactly(2 * INITIAL_WINDOW_BYTES)
        await other.write(b"unharmed")
        assert await others.read_exactly(8) == b"unharmed"
        assert mine.stream_id not in alice.muxer.streams
        assert theirs.stream_id not in bob.muxer.streams


async def test_a_cancelled_write_that_a_full_socket_holds_back_harms_nothing() -> None:
    async with open_muxers(capacity=1000) as (alice, bob):
        mine, _ = await stream_pair(alice, bob)
        other, others = await stream_pair(alice, bob)
        await trio.testing.wait_all_tasks_blocked()
        bob.wire.frozen = True
        await cancelled(mine.write, bytes(200_000))
        bob.wire.frozen = False
        bob.wire.wake()
        await other.write(b"unharmed")
        assert await others.read_exactly(8) == b"unharmed"


async def test_a_writer_whose_socket_never_blocks_can_be_cancelled() -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        written = 0
        with trio.CancelScope() as scope:
            scope.cancel()
            while written < 1000:
                written += 1
                await mine.write(b"x")
        assert written < 1000
        assert len(await theirs.read_exactly(written)) == written
        await mine.write(b"still whole")
        assert await theirs.read_exactly(11) == b"still whole"


async def test_a_cancelled_read_loses_nothing() -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(b"first ")
        await cancelled(theirs.read_exactly, 12)
        await mine.write(b"second")
        assert await theirs.read_exactly(12) == b"first second"


async def test_a_paused_reader_holds_the_writer_back_and_nothing_is_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Stock yamux resets the stream when a full window stays full for 5 seconds."""
    data = bytes(3 * INITIAL_WINDOW_BYTES)
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.write, data)
            await trio.sleep(60)
            assert len(theirs._buffer) == INITIAL_WINDOW_BYTES
            assert mine.outgoing
            assert await theirs.read_exactly(len(data)) == data


async def test_too_many_streams_raise_instead_of_waiting() -> None:
    """Stock py-libp2p waits, silently and for ever, with the 257th."""
    async with open_muxers() as (alice, bob):
        streams = [alice.muxer.open_stream() for _ in range(yamux.MAX_STREAMS_EACH_WAY)]
        with pytest.raises(LocalProtocolError, match="256 streams"):
            alice.muxer.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        assert len(bob.opened_by_peer) == len(streams)
        streams[7].reset()
        await trio.testing.wait_all_tasks_blocked()
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(b"again")
        assert await theirs.read_exactly(5) == b"again"


async def test_a_stream_beyond_the_limit_is_refused_and_the_rest_go_on() -> None:
    async with open_against_script() as (script, bob):
        opened = yamux.MAX_STREAMS_EACH_WAY + 3
        for number in range(opened):
            await script.write(frame(DATA, SYN, 2 * number + 1, 2, b"hi"))
        await trio.testing.wait_all_tasks_blocked()
        assert bob.muxer.failure is None
        assert len(bob.opened_by_peer) == yamux.MAX_STREAMS_EACH_WAY
        answers = bytes(script.try_receive() or b"")
        assert answers.count(frame(WINDOW_UPDATE, RST, 2 * opened - 1, 0)) == 1
        assert await bob.opened_by_peer[-1].read_exactly(2) == b"hi"


async def test_a_peer_that_pushes_past_the_window_is_cut_off() -> None:
    """Stock yamux only logs it, and keeps the bytes."""
    async with open_against_script() as (script, bob):
        await script.write(frame(WINDOW_UPDATE, SYN, 1, 0))
        for _ in range(INITIAL_WINDOW_BYTES // 16_384):
            await script.write(frame(DATA, 0, 1, 16_384, bytes(16_384)))
            await trio.testing.wait_all_tasks_blocked()
        (stream,) = bob.opened_by_peer
        assert bob.muxer.failure is None
        assert len(stream._buffer) == INITIAL_WINDOW_BYTES
        await script.write(frame(DATA, 0, 1, 1, b"x"))
        await trio.testing.wait_all_tasks_blocked()
        assert [type(reason) for reason in bob.ended] == [PeerMisbehaved]
        assert len(stream._buffer) == INITIAL_WINDOW_BYTES


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
        pytest.param(HEADER.pack(0, 9, 0, 1, 0), id="unknown type"),
        pytest.param(HEADER.pack(1, DATA, 0, 1, 0), id="unknown version"),
        pytest.param(frame(DATA, SYN, 2, 0), id="a number of ours"),
        pytest.param(frame(DATA, SYN, 0, 0), id="stream 0"),
        pytest.param(frame(DATA, SYN, 1, 0) * 2, id="opened twice"),
        pytest.param(frame(DATA, SYN, 1, 0xFFFFFFFF), id="4 GiB"),
    ],
)
async def test_garbage_ends_the_connection(garbage: bytes) -> None:
    async with open_against_script() as (script, bob):
        await script.write(garbage)
        await trio.testing.wait_all_tasks_blocked()
        assert [type(reason) for reason in bob.ended] == [PeerMisbehaved]
        assert bob.wire.closed


async def test_frames_may_arrive_in_any_pieces() -> None:
    stream_of_bytes = (
        frame(WINDOW_UPDATE, SYN, 1, 0)
        + frame(PING, SYN, 0, 7)
        + frame(DATA, 0, 99, 3, b"???")
        + frame(DATA, 0, 1, 5, b"hello")
        + frame(DATA, FIN, 1, 6, b" there")
    )
    async with open_against_script() as (script, bob):
        for byte in stream_of_bytes:
            await script.write(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
        (stream,) = bob.opened_by_peer
        assert await stream.read_start(11) == b"hello there"
        assert await stream.read_start(1) is None
        answers = bytes(script.try_receive() or b"")
        assert frame(PING, ACK, 0, 7) in answers
        assert frame(WINDOW_UPDATE, ACK, 1, 0) in answers


async def test_a_peer_that_asks_and_never_reads_is_cut_off() -> None:
    async with open_against_script() as (script, bob):
        bob.wire.capacity = 1000
        pings = frame(PING, SYN, 0, 1) * 1000
        for _ in range(10):
            if bob.muxer.failure is not None:
                break
            script.seal(pings)
            script.push()
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert [type(reason) for reason in bob.ended] == [PeerMisbehaved]


async def test_a_silent_peer_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    """Stock py-libp2p never notices."""
    async with open_muxers() as (alice, bob):
        mine, _ = await stream_pair(alice, bob)
        await trio.sleep(100)
        assert alice.muxer.failure is None
        bob.wire.frozen = True
        frozen_at = trio.current_time()
        with pytest.raises(PeerGone, match="fell silent"):
            await mine.read_exactly(1)
        noticed_after = trio.current_time() - frozen_at
        assert noticed_after <= yamux.SILENCE_LIMIT_S + yamux.PING_INTERVAL_S + 0.1
        assert alice.wire.closed


async def test_round_trips_are_measured(autojump_clock: trio.testing.MockClock) -> None:
    async with open_muxers() as (alice, _bob):
        await trio.testing.wait_all_tasks_blocked()
        assert alice.muxer.rtt_s == 0.0
        assert await alice.muxer.ping() == 0.0


async def test_a_goodbye_ends_streams_at_once() -> None:
    async with open_muxers() as (alice, bob):
        _, theirs = await stream_pair(alice, bob)
        alice.muxer.close()
        with pytest.raises(PeerGone, match="goodbye"):
            await theirs.read_exactly(1)


async def test_a_small_message_overtakes_bulk() -> None:
    async with open_muxers(capacity=200_000) as (alice, bob):
        bulk, _ = await stream_pair(alice, bob)
        small, small_there = await stream_pair(alice, bob)
        await trio.testing.wait_all_tasks_blocked()
        bob.wire.frozen = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.write, bytes(MIB))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(small.write, b"now")
            await trio.testing.wait_all_tasks_blocked()
            bulk_there = bob.opened_by_peer[0]
            bob.wire.frozen = False
            bob.wire.wake()
            assert await small_there.read_exactly(3) == b"now"
            # Only what the kernel had taken before may come first.
            assert len(bulk_there._buffer) <= INITIAL_WINDOW_BYTES
            assert bulk.outgoing
            assert len(await bulk_there.read_exactly(MIB)) == MIB


# The second size fills a Noise message to the last byte, so that nothing fits beside it.
@pytest.mark.parametrize(("size", "capacity"), [(60_000, 70_000), (65_507, 200_000)])
async def test_bulk_has_its_turn_beside_endless_small_messages(size: int, capacity: int) -> None:
    async with open_muxers(capacity=capacity) as (alice, bob):
        bulk, _ = await stream_pair(alice, bob)
        bulk_there = bob.opened_by_peer[-1]
        chatty = [await stream_pair(alice, bob) for _ in range(8)]

        async def chat(index: int) -> None:
            while True:
                await chatty[index][0].write(bytes(size))

        async def listen(index: int) -> None:
            while True:
                await chatty[index][1].read_exactly(size)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for index in range(8):
                    nursery.start_soon(chat, index)
                    nursery.start_soon(listen, index)
                nursery.start_soon(bulk.write, bytes(MIB))
                assert len(await bulk_there.read_exactly(MIB)) == MIB
                nursery.cancel_scope.cancel()


async def test_the_window_follows_the_bandwidth_delay_product(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await trio.testing.wait_all_tasks_blocked()
        bob.muxer._pings._rtts.clear()
        bob.muxer._pings._rtts.append(10.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.write, bytes(64 * MIB))
            await theirs.read_exactly(64 * MIB)
        assert theirs._window == yamux_stream.MAX_WINDOW_BYTES
        bob.muxer._pings._rtts.append(0.0)
        mine, theirs = await stream_pair(alice, bob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.write, bytes(8 * MIB))
            await theirs.read_exactly(8 * MIB)
        assert theirs._window == INITIAL_WINDOW_BYTES


async def test_a_finished_stream_is_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await mine.close_write()
        await theirs.finish()
        await trio.testing.wait_all_tasks_blocked()
        assert not alice.muxer.streams
        assert not bob.muxer.streams
        mine, theirs = await stream_pair(alice, bob)
        await theirs.finish()
        await trio.sleep(yamux.LINGER_S + 2 * yamux.PING_INTERVAL_S)
        assert not alice.muxer.streams
        assert not bob.muxer.streams
        with pytest.raises(PeerGone):
            await mine.write(b"x")


async def test_a_complete_answer_is_complete_although_the_connection_ends_with_it() -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(b"answer")
        await mine.close_write()
        alice.muxer.close()
        assert await theirs.read_exactly(6) == b"answer"
        assert await theirs.read_start(1) is None
        with pytest.raises(PeerGone):
            await theirs.write(b"x")


async def test_reading_what_a_dead_stream_left_takes_nothing_from_the_others() -> None:
    async with open_muxers() as (alice, bob):
        mine, theirs = await stream_pair(alice, bob)
        await mine.write(bytes(INITIAL_WINDOW_BYTES))
        await trio.testing.wait_all_tasks_blocked()
        bob.muxer._pings._rtts.clear()
        bob.muxer._pings._rtts.append(10.0)
        mine.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert len(await theirs.read_exactly(INITIAL_WINDOW_BYTES)) == INITIAL_WINDOW_BYTES
        assert bob.muxer._granted == 0


async def test_nothing_behind_the_end_of_a_connection_is_taken() -> None:
    async with open_against_script() as (script, bob):
        script.seal(frame(PING, SYN, 0, 1) * 5000)
        script.seal(frame(WINDOW_UPDATE, SYN, 1, 0))
        script.push()
        await trio.testing.wait_all_tasks_blocked()
        assert [type(reason) for reason in bob.ended] == [PeerMisbehaved]
        assert not bob.opened_by_peer


async def test_sealed_messages_may_arrive_in_any_pieces() -> None:
    async with open_against_script() as (script, bob):
        script.seal(frame(DATA, SYN, 1, 5, b"hello"))
        script.seal(frame(DATA, FIN, 1, 6, b" there"))
        sealed = bytes(script.scratch.out[: script._batched])
        script._batched = 0
        for byte in sealed:
            assert script.wire.try_send(bytes([byte])) == 1
            await trio.testing.wait_all_tasks_blocked()
        assert bob.muxer.failure is None
        (stream,) = bob.opened_by_peer
        assert await stream.read_exactly(11) == b"hello there"
