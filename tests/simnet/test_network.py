"""The simulated network by itself: what TCP would do, to the microsecond, and what rules do."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from petalnode.p2p.wire import WOULD_BLOCK
from petalnode.simnet.clock import seeded_scheduler
from petalnode.simnet.links import Rule
from petalnode.simnet.network import MAX_RETRANSMIT_S, RETRANSMIT_S, Network
from petalnode.simnet.wires import WINDOW_BYTES, SimWire

PORT = 4001
LATENCY_S = 0.1
MIB = 1024 * 1024
LIMIT_S = 10_000.0


class Pair:
    """Host a has dialled host b: ``near`` is a's end and ``far`` is b's."""

    def __init__(self, network, near, far):
        self.network, self.near, self.far = network, near, far
        self.there, self.back = network.link("a", "b"), network.link("b", "a")


@asynccontextmanager
async def open_network(seed: int = 1, **defaults: float) -> AsyncIterator[Network]:
    with seeded_scheduler(seed):
        async with trio.open_nursery() as nursery:
            network = Network(seed, **{"latency_s": LATENCY_S} | defaults)
            nursery.start_soon(network.run)
            with trio.fail_after(LIMIT_S):  # virtual: what hangs fails at once
                yield network
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_pair(seed: int = 1, **defaults: float) -> AsyncIterator[Pair]:
    async with open_network(seed, **defaults) as network:
        listening = network.transport("b").listen(network.host("b").address, PORT)
        near = await network.transport("a").dial(network.host("b").address, PORT)
        yield Pair(network, near, await listening.accept())


async def send(wire: SimWire, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[wire.try_send(view) :]
        if view:
            await wire.writable()


async def receive(wire: SimWire, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        buffer = bytearray(n - len(data))
        got = wire.try_receive(memoryview(buffer))
        if got == WOULD_BLOCK:
            await wire.readable()
        else:
            assert got, f"it ended after {len(data)} bytes"
            data += buffer[:got]
    return bytes(data)


def now() -> float:
    return trio.current_time()


async def test_a_dial_takes_a_round_trip_and_is_accepted_half_a_one_later(autojump_clock):
    async with open_network() as network:
        listening = network.transport("b").listen(network.host("b").address, PORT)
        started = now()
        near = await network.transport("a").dial(network.host("b").address, PORT)
        assert now() - started == pytest.approx(2 * LATENCY_S)
        far = await listening.accept()
        assert now() - started == pytest.approx(3 * LATENCY_S)
        assert near.remote == (network.host("b").address, PORT)
        assert far.remote[0] == network.host("a").address


async def test_bytes_take_the_latency_and_their_size_over_the_bandwidth(autojump_clock):
    async with open_pair(bandwidth=1e6) as pair:
        for size in (1, 1000, 100_000):
            started = now()
            await send(pair.near, bytes(size))
            await receive(pair.far, size)
            assert now() - started == pytest.approx(LATENCY_S + size / 1e6)


async def test_connections_share_the_bandwidth_of_their_link(autojump_clock):
    async with open_pair(bandwidth=1e6) as pair:
        host = pair.network.host("b")
        second = await pair.network.transport("a").dial(host.address, PORT)
        started = now()
        await send(pair.near, bytes(100_000))
        await send(second, bytes(1))
        await receive(pair.far, 100_000)
        assert now() - started == pytest.approx(LATENCY_S + 0.1, abs=1e-4)
        # The second one waited for the first to be on its way.
        assert pair.there.free_at - started == pytest.approx(0.100001)


async def test_a_sender_is_held_back_while_much_is_unsent(autojump_clock):
    async with open_pair(bandwidth=1e6) as pair:
        assert pair.near.try_send(bytes(100_000)) == 100_000
        assert pair.near.try_send(b"more") == 0
        started = now()
        await pair.near.writable()
        assert now() - started == pytest.approx((100_000 - 16 * 1024) / 1e6)
        assert pair.near.try_send(b"more") == 4


async def test_the_two_directions_may_differ(autojump_clock):
    async with open_pair() as pair:
        pair.back.latency_s = 0.5
        started = now()
        await send(pair.near, b"question")
        await receive(pair.far, 8)
        await send(pair.far, b"answer")
        await receive(pair.near, 6)
        assert now() - started == pytest.approx(0.6)


async def test_jitter_delays_and_never_reorders(autojump_clock):
    async with open_pair(jitter_s=0.5) as pair:
        arrivals = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                for n in range(100):
                    assert await receive(pair.far, 1) == bytes([n])
                    arrivals.append(now() - n * 0.01 - started)

            started = now()
            nursery.start_soon(read)
            for n in range(100):
                await send(pair.near, bytes([n]))
                await trio.sleep(0.01)
        assert all(LATENCY_S <= delay <= LATENCY_S + 0.5 + 1e-9 for delay in arrivals)
        assert len({round(delay, 6) for delay in arrivals}) > 10


async def lossy_run(seed: int, loss: float) -> list[float]:
    arrivals = []
    async with open_pair(seed, loss=loss) as pair:
        for n in range(50):
            await send(pair.near, bytes([n]))
            assert await receive(pair.far, 1) == bytes([n])
            arrivals.append(now())
    return arrivals


async def test_loss_costs_time_and_no_byte_and_depends_on_the_seed_alone(autojump_clock):
    clean = await lossy_run(1, 0.0)
    duration = clean[-1] - clean[0]
    assert duration == pytest.approx(49 * LATENCY_S)
    runs = [await lossy_run(seed, 0.2) for seed in (1, 1, 2)]
    first, again, other = ([round(at - run[0], 9) for at in run] for run in runs)
    assert first == again != other
    # About 50 x 0.25 retransmissions of at least 0.2 s each.
    assert duration + 5 * RETRANSMIT_S < first[-1] < duration + 40 * RETRANSMIT_S


async def test_a_loss_within_much_data_is_mended_after_a_round_trip(autojump_clock):
    async with open_pair() as pair:
        pair.network.rules.append(Rule(lambda parcel: parcel.size > 9000, lose=True))
        started = now()
        await send(pair.near, bytes(10_000))
        await receive(pair.far, 10_000)
        assert now() - started == pytest.approx(3 * LATENCY_S)


async def test_one_way_partition_one_side_hears_the_other_does_not(autojump_clock):
    async with open_pair() as pair:
        pair.network.set_up([pair.there], False)
        started = now()
        await send(pair.near, b"unheard")
        await send(pair.far, b"heard")
        assert await receive(pair.near, 5) == b"heard"
        assert now() - started == pytest.approx(LATENCY_S)
        with trio.move_on_after(0.9 - LATENCY_S):
            await receive(pair.far, 1)
            pytest.fail("it crossed a partition")
        pair.network.set_up([pair.there], True)
        assert await receive(pair.far, 7) == b"unheard"
        # TCP tried after 0.2, 0.6 and 1.4 seconds; the last came through.
        assert now() - started == pytest.approx(1.4 + LATENCY_S)


async def test_what_is_sent_behind_a_held_up_byte_stays_behind_it(autojump_clock):
    async with open_pair() as pair:
        pair.network.set_up([pair.there], False)
        await send(pair.near, b"first ")
        pair.network.set_up([pair.there], True)
        await send(pair.near, b"second")
        assert await receive(pair.far, 12) == b"first second"


async def test_a_partition_of_an_hour_is_tried_every_two_minutes(autojump_clock):
    async with open_pair() as pair:
        pair.network.set_up([pair.there], False)
        started = now()
        await send(pair.near, b"x")
        pair.network.post(started + 3600, lambda: pair.network.set_up([pair.there], True))
        await receive(pair.far, 1)
        assert 3600 < now() - started <= 3600 + MAX_RETRANSMIT_S + LATENCY_S


async def test_a_reader_that_pauses_stops_the_writer_at_the_window(autojump_clock):
    async with open_pair() as pair:
        sent = 0
        while taken := pair.near.try_send(bytes(MIB)):
            sent += taken
        assert sent == WINDOW_BYTES
        with trio.move_on_after(60) as patience:
            await pair.near.writable()
        assert patience.cancelled_caught
        await receive(pair.far, MIB)
        await pair.near.writable()
        assert pair.near.try_send(bytes(2 * MIB)) == MIB


async def test_without_acknowledgements_the_window_fills(autojump_clock):
    async with open_pair() as pair:
        pair.network.set_up([pair.back], False)
        await send(pair.near, bytes(WINDOW_BYTES))
        await receive(pair.far, WINDOW_BYTES)
        assert pair.near.try_send(b"x") == 0
        pair.network.set_up([pair.back], True)
        await pair.near.writable()
        assert pair.near.try_send(b"x") == 1


async def test_closing_is_heard_behind_the_last_byte_and_writing_on_is_answered_with_a_reset(
    autojump_clock,
):
    async with open_pair(bandwidth=1e6) as pair:
        await send(pair.near, bytes(100_000))
        pair.near.close()
        await receive(pair.far, 100_000)
        await pair.far.readable()
        assert pair.far.try_receive(memoryview(bytearray(1))) == 0
        await send(pair.far, b"anybody there?")
        await trio.sleep(2 * LATENCY_S + 0.01)
        with pytest.raises(ConnectionResetError):
            pair.far.try_send(b"x")
        with pytest.raises(OSError, match="closed here"):
            pair.near.try_send(b"x")


async def test_a_killed_program_resets_its_connections_and_refuses_new_ones(autojump_clock):
    async with open_pair() as pair:
        killed = now()
        pair.network.kill("b", silent=False)
        with pytest.raises(ConnectionResetError):
            await pair.near.readable()
        assert now() - killed == pytest.approx(LATENCY_S)
        started = now()
        with pytest.raises(ConnectionRefusedError):
            await pair.network.transport("a").dial(pair.network.host("b").address, PORT)
        assert now() - started == pytest.approx(2 * LATENCY_S)


async def test_a_machine_without_power_tells_nobody_and_when_it_is_back_knows_nothing(
    autojump_clock,
):
    async with open_pair() as pair:
        pair.network.kill("b", silent=True)
        with trio.move_on_after(1000) as patience:
            await pair.near.readable()
        assert patience.cancelled_caught
        with trio.move_on_after(1000) as patience:
            await pair.network.transport("a").dial(pair.network.host("b").address, PORT)
        assert patience.cancelled_caught
        assert pair.near.try_send(b"into the void") == 13
        await trio.sleep(1)
        pair.network.host("b").is_up = True
        asked = now()
        assert pair.near.try_send(b"are you back?") == 13
        with pytest.raises(ConnectionResetError):
            await pair.near.readable()
        assert now() - asked == pytest.approx(2 * LATENCY_S)


async def test_what_a_dead_host_still_does_reaches_nobody(autojump_clock):
    async with open_pair() as pair:
        pair.network.kill("b", silent=True)
        assert pair.far.try_send(b"goodbye") == 7
        assert pair.far.try_receive(memoryview(bytearray(8))) == WOULD_BLOCK
        pair.far.close()
        await trio.sleep(10)
        assert pair.near.try_receive(memoryview(bytearray(8))) == WOULD_BLOCK


async def test_a_dial_across_a_partition_is_answered_once_it_heals(autojump_clock):
    async with open_network() as network:
        network.transport("b").listen(network.host("b").address, PORT)
        network.set_up([network.link("b", "a")], False)
        network.post(2.0, lambda: network.set_up([network.link("b", "a")], True))
        await network.transport("a").dial(network.host("b").address, PORT)
        # The answer was tried after 0, 1 and 3 seconds.
        assert now() == pytest.approx(2 * LATENCY_S + 3)


async def test_who_dies_while_dialling_connects_to_nobody(autojump_clock):
    async with open_network() as network:
        listening = network.transport("b").listen(network.host("b").address, PORT)
        network.post(0.15, lambda: network.kill("a", silent=True))
        with trio.move_on_after(60) as patience:
            await network.transport("a").dial(network.host("b").address, PORT)
        with trio.move_on_after(60) as nobody:
            await listening.accept()
        assert patience.cancelled_caught
        assert nobody.cancelled_caught


async def test_a_rule_goes_when_it_was_applied_as_often_as_it_should(autojump_clock):
    async with open_pair() as pair:
        seen = []
        pair.network.rules.append(
            Rule(lambda parcel: parcel.size == 1, seen.append, delay_s=1.0, times=2)
        )
        delays = []
        for _ in range(4):
            started = now()
            await send(pair.near, b"x")
            await receive(pair.far, 1)
            delays.append(round(now() - started, 6))
        assert delays == [1.1, 1.1, 0.1, 0.1]
        assert [(p.source, p.target, p.size, p.total) for p in seen] == [
            ("a", "b", 1, 0),
            ("a", "b", 1, 1),
        ]
        assert pair.network.rules == []


async def test_a_rule_goes_when_its_time_is_over(autojump_clock):
    async with open_pair() as pair:
        rule = Rule(lambda parcel: True, delay_s=1.0, times=1000, until=now() + 5)
        pair.network.rules.append(rule)
        for expected in (1.1, 0.1):
            started = now()
            await send(pair.near, b"x")
            await receive(pair.far, 1)
            assert now() - started == pytest.approx(expected)
            await trio.sleep(5)
        assert pair.network.rules == []


async def test_a_rule_may_kill_at_the_byte(autojump_clock):
    async with open_pair() as pair:
        network = pair.network
        network.rules.append(
            Rule(lambda parcel: parcel.total >= 3, lambda parcel: network.kill("a", silent=False))
        )
        for _ in range(5):
            pair.near.try_send(b"x")
        await trio.sleep(1)
        assert network.trace.link_bytes["a", "b"] == 3
        with pytest.raises(ConnectionResetError):
            pair.far.try_receive(memoryview(bytearray(8)))


async def test_addresses_and_ports_that_cannot_be_had(autojump_clock):
    async with open_network() as network:
        address = network.host("a").address
        transport = network.transport("a")
        first = transport.listen(address, PORT)
        with pytest.raises(OSError, match="in use"):
            transport.listen(address, PORT)
        with pytest.raises(OSError, match="Cannot assign"):
            transport.listen("192.0.2.1", PORT)
        with pytest.raises(OSError, match="No route"):
            await transport.dial("192.0.2.1", PORT)
        assert transport.listen(address, 0).address[1] != PORT
        first.close()
        with pytest.raises(trio.ClosedResourceError):
            await first.accept()
        transport.listen(address, PORT)


async def test_the_trace_tells_runs_apart_by_what_was_carried_and_when(autojump_clock):
    digests = []
    for size, pause in ((100, 0.0), (100, 0.0), (101, 0.0), (100, 0.5)):
        async with open_pair() as pair:
            began = len(pair.network.trace.recent)
            trace = type(pair.network.trace)()
            offset = now()
            pair.network.trace = trace
            await trio.sleep(pause)
            await send(pair.near, bytes(size))
            await receive(pair.far, size)
            lines = [line.split(" ", 1) for line in trace.recent]
            digests.append([(round(float(at) - offset, 6), rest) for at, rest in lines])
            assert began == 1  # the opening
            assert trace.link_bytes == {("a", "b"): size}
            assert len(trace.digest) == 64
    assert digests[0] == digests[1] == [(0.0, "send a>b 100")]
    assert digests[2] == [(0.0, "send a>b 101")]
    assert digests[3] == [(0.5, "send a>b 100")]
    assert math.isfinite(now())
