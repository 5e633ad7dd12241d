"""Real hosts (Noise, yamux, keepalive) over the simulated network: what they notice, and when."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from petalnode.errors import ListenError, PeerGone, PeerUnreachable
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import new_identity
from petalnode.p2p.swarm import DIAL_DEADLINE_S
from petalnode.p2p.yamux import PING_INTERVAL_S, SILENCE_LIMIT_S
from petalnode.simnet.clock import seeded_scheduler
from petalnode.simnet.network import Network

ECHO = "/test/echo/1"
LATENCY_S = 0.05
LIMIT_S = 1000.0


class Pair:
    """Hosts a and b; a is connected to b. ``lost`` says when who lost whom."""

    def __init__(self, network: Network, a: Host, b: Host) -> None:
        self.network, self.a, self.b = network, a, b
        self.lost: dict[str, float] = {}
        for name, host in (("a", a), ("b", b)):
            host.on_disconnect(lambda _peer, name=name: self.lost.setdefault(name, now()))


def now() -> float:
    return trio.current_time()


async def echo(stream: FrameStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame.header)


@asynccontextmanager
async def open_pair() -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        stack.enter_context(seeded_scheduler(1))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        network = Network(1, latency_s=LATENCY_S)
        nursery.start_soon(network.run)
        hosts = []
        for name in ("a", "b"):
            host = open_host(
                new_identity(name.encode() * 32),
                listen=[f"/ip4/{network.host(name).address}/tcp/4001"],
                transport=network.transport(name),
            )
            hosts.append(await stack.enter_async_context(host))
        await hosts[0].connect(hosts[1].addrs[0])
        hosts[1].serve(ECHO, echo)
        with trio.fail_after(LIMIT_S):  # virtual: what hangs fails at once
            yield Pair(network, *hosts)


async def test_a_round_trip_is_twice_the_latency_and_an_opened_stream_costs_one(autojump_clock):
    async with open_pair() as pair:
        assert await pair.a.ping(pair.b.peer_id) == pytest.approx(2 * LATENCY_S)
        assert pair.b.rtt_s(pair.a.peer_id) == pytest.approx(2 * LATENCY_S)
        started = now()
        stream = await pair.a.open_stream(pair.b.peer_id, ECHO)
        assert now() - started == pytest.approx(2 * LATENCY_S)
        await stream.send({"word": "hello"})
        assert (await stream.receive()).header == {"word": "hello"}
        assert now() - started == pytest.approx(4 * LATENCY_S)


async def test_a_killed_program_is_noticed_at_once(autojump_clock):
    async with open_pair() as pair:
        await trio.sleep(10)
        killed = now()
        pair.network.kill("b", silent=False)
        await trio.sleep(1)
        assert pair.lost["a"] - killed == pytest.approx(LATENCY_S)


async def test_a_machine_without_power_is_noticed_by_the_keepalive(autojump_clock):
    async with open_pair() as pair:
        await trio.sleep(10.5)
        killed = now()
        pair.network.kill("b", silent=True)
        await trio.sleep(20)
        noticed_s = pair.lost["a"] - killed
        assert noticed_s >= SILENCE_LIMIT_S - PING_INTERVAL_S
        assert noticed_s <= SILENCE_LIMIT_S + PING_INTERVAL_S + 2 * LATENCY_S


async def test_who_does_not_hear_hangs_up_and_who_is_not_heard_is_told(autojump_clock):
    async with open_pair() as pair:
        await trio.sleep(10)
        cut = now()
        pair.network.set_up([pair.network.link("a", "b")], False)
        await trio.sleep(20)
        # b hears nothing of a any more and closes; a, who hears b all the time, learns of that.
        assert pair.lost["b"] - cut >= SILENCE_LIMIT_S - PING_INTERVAL_S
        assert pair.lost["a"] == pytest.approx(pair.lost["b"] + LATENCY_S)


async def test_a_short_partition_is_not_noticed_at_all(autojump_clock):
    async with open_pair() as pair:
        stream = await pair.a.open_stream(pair.b.peer_id, ECHO)
        links = pair.network.between("a", "b", oneway=False)
        pair.network.set_up(links, False)
        pair.network.post(now() + 3.0, lambda: pair.network.set_up(links, True))
        sent = now()
        await stream.send({"word": "late"})
        assert (await stream.receive()).header == {"word": "late"}
        assert 3.0 < now() - sent < SILENCE_LIMIT_S
        await trio.sleep(20)
        assert pair.lost == {}


async def test_a_stream_to_a_peer_that_falls_silent_ends_with_the_reason(autojump_clock):
    async with open_pair() as pair:
        stream = await pair.a.open_stream(pair.b.peer_id, ECHO)
        pair.network.kill("b", silent=True)
        with pytest.raises(PeerGone, match="fell silent"):
            await stream.receive()


async def test_nobody_at_home_and_no_answer_at_all(autojump_clock):
    async with open_pair() as pair:
        pair.network.kill("b", silent=False)
        await trio.sleep(1)
        started = now()
        with pytest.raises(PeerUnreachable, match="refused"):
            await pair.a.open_stream(pair.b.peer_id, ECHO)
        assert now() - started == pytest.approx(2 * LATENCY_S)
        pair.network.host("b").is_up = False
        started = now()
        with pytest.raises(PeerUnreachable, match="no answer in time"):
            await pair.a.open_stream(pair.b.peer_id, ECHO)
        assert now() - started == pytest.approx(DIAL_DEADLINE_S)


async def test_a_port_is_taken_as_on_a_real_machine(autojump_clock):
    async with open_pair() as pair:
        address = f"/ip4/{pair.network.host('a').address}/tcp/4001"
        with pytest.raises(ListenError, match="already in use"):
            async with open_host(
                new_identity(b"c" * 32), listen=[address], transport=pair.network.transport("a")
            ):
                pytest.fail("two listen on one port")


async def test_bulk_fills_a_slow_link_and_small_messages_pass_it(autojump_clock):
    async with open_pair() as pair:
        for link in pair.network.between("a", "b", oneway=False):
            link.bandwidth = 1e6
        received = trio.Event()

        async def sink(stream: FrameStream) -> None:
            for _ in range(20):
                await stream.receive()
            received.set()

        pair.b.serve("/test/sink/1", sink)
        small = await pair.a.open_stream(pair.b.peer_id, ECHO)
        bulk = await pair.a.open_stream(pair.b.peer_id, "/test/sink/1")
        started = now()

        async def fill() -> None:
            for _ in range(20):
                await bulk.send({"filler": bytes(100_000)})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            await trio.sleep(0.5)
            asked = now()
            await small.send({"word": "now"})
            await small.receive()
            assert now() - asked < 2 * LATENCY_S + 0.3
            await received.wait()
        assert 2.0 < now() - started < 2.3
