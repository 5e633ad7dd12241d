"""What a node says and does about the span it holds: loading, moving, draining, leaving."""

import math
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trio
import trio.testing

from petalnode import holding as module
from petalnode.errors import ModelError
from petalnode.events import Draining, Moving, Ready
from petalnode.holding import (
    DRAIN_DEADLINE_S,
    GOODBYE_DEADLINE_S,
    MIN_TPS,
    MOVE_DRAIN_S,
    Holding,
    Terms,
)
from petalnode.models.span import LoadedBlock, Span
from petalnode.p2p.memory import memory_frame_pair
from petalnode.routing.announcement import MAX_ADDRS, MAX_BANDWIDTH, MAX_TPS
from petalnode.serving.known_rates import Rates
from petalnode.serving.service import Throughput

from ..routing.records import record

CPU = torch.device("cpu")


class Config:
    max_positions = 2048


CONFIG = Config()
OFFERED = [SimpleNamespace(name=name, block_bytes=size) for name, size in (("law", 3), ("poem", 5))]


def a_span(start, end):
    return Span(CONFIG, start, [LoadedBlock(n, 1) for n in range(start, end)], torch.float32, CPU)


class Service:
    """A loaded span; its sessions end when ``idle`` is set."""

    def __init__(self, blocks, keep, made):
        self.blocks, self.keep, self.made = blocks, keep, made
        self.span = a_span(*blocks)
        self.engine = SimpleNamespace(span=self.span, queue_depth=3, serve=self.serve)
        self.server = SimpleNamespace(draining=False, adapters=None, handle=self.handle)
        self.training = SimpleNamespace(handle=self.handle_training)
        self.budget = SimpleNamespace(tokens_free=77)
        self.throughput = Throughput(12.0, 340.0)
        self.sessions, self.idle, self.handled, self.state = 2, trio.Event(), [], "made"
        self.told = 0

    async def serve(self):
        self.state = "serving"
        try:
            await trio.sleep_forever()
        finally:
            self.state = "ended"

    async def handle(self, stream):
        self.handled.append(("hop", stream))

    async def handle_training(self, stream):
        self.handled.append(("training", stream))

    async def drain(self):
        assert self.server.draining
        self.told += 1

    async def wait_idle(self):
        await self.idle.wait()

    def memory(self):
        return {"weights": 5, "peak": 6}


class Swarm:
    """Keeps what is published."""

    ttl_s = 30.0

    def __init__(self):
        self.said, self.beats, self.known, self.stuck = [], [], [], False

    async def publish(self, record):
        if self.stuck:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        self.said.append(record)

    async def beat(self, announcement, room):
        self.beats.append((announcement, room))

    def rtts_to_announce(self):
        return {"other": 0.5}

    def others(self):
        return self.known


class Home:
    """A holding, and all that it is put into."""

    def __init__(self, nursery, monkeypatch, **terms):
        self.services, self.events, self.damaged, self.loads = [], [], set(), []
        self.swarm, self.rates = Swarm(), {}
        self.meter = SimpleNamespace(bytes_per_s=9.0)
        known = SimpleNamespace(get=self.rates.get, put=self.rates.__setitem__)
        self.machine = SimpleNamespace(
            wall_clock=lambda: 1000.5, measure="measure", known_rates=known
        )
        monkeypatch.setattr(module, "load_service", self.load_service)
        for name in ("find_offered", "load_offered", "load_remaining"):
            monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(module, "rates_key", lambda *parts: parts)
        checkpoint = SimpleNamespace(config=CONFIG, fingerprint="f" * 32, name="a model")
        addrs = tuple(f"/ip4/1.2.3.4/tcp/{port}/p2p/own" for port in range(MAX_ADDRS + 1))
        self.terms = Terms(
            checkpoint, "own", addrs, "home", torch.float32, CPU, "nf4", 100, 200, True
        )
        self.terms = replace(self.terms, **terms)
        self.holding = Holding(
            self.terms,
            self.swarm,
            self.machine,
            self,
            "connect",
            self.meter,
            nursery,
            self.events.append,
        )

    async def run(self, function):
        await trio.lowlevel.checkpoint()
        return function()

    async def load_service(self, checkpoint, blocks, *, keep, **made):
        await trio.lowlevel.checkpoint()
        self.loads.append(("blocks", blocks))
        if blocks in self.damaged:
            raise ModelError("The blocks are damaged.", "Download them again.")
        assert checkpoint is self.terms.checkpoint
        self.services.append(Service(blocks, keep, made))
        return self.services[-1]

    def find_offered(self, places, config, cache_dir):
        assert (places, config, cache_dir) == (self.terms.adapters, CONFIG, self.terms.cache_dir)
        return tuple(OFFERED)

    def load_offered(self, offered, config, blocks, device):
        assert (config, device) == (CONFIG, CPU)
        self.loads.append(("all", blocks))
        return {one.name: blocks for one in offered}

    def load_remaining(self, offered, config, blocks, device):
        self.loads.append(("remaining", blocks))
        return {one.name: blocks for one in offered if one.name != "law"}

    @property
    def states(self):
        return [(a.state, (a.start, a.end), a.moving_to) for a in self.swarm.said]

    def drained(self):
        for service in self.services:
            service.idle.set()


@asynccontextmanager
async def a_home(monkeypatch, blocks=(2, 4), **terms):
    """A holding that serves ``blocks``."""
    async with trio.open_nursery() as nursery:
        home = Home(nursery, monkeypatch, **terms)
        await home.holding.find_adapters()
        if blocks is not None:
            await home.holding.intend(blocks)
            await home.holding.load()
            await trio.testing.wait_all_tasks_blocked()
        yield home
        nursery.cancel_scope.cancel()


async def test_a_client_holds_nothing_and_says_nothing(monkeypatch):
    async with a_home(monkeypatch, None) as home:
        holding = home.holding
        assert (holding.sessions, holding.blocks, holding.adapter_bytes) == (0, None, 0)
        await holding.drain()
        await holding.leave()
        assert await holding.move((0, 2)) is False
        assert holding.expected_rates() is None
        assert (home.swarm.said, home.events) == ([], [])


async def test_blocks_are_announced_then_loaded_then_served(monkeypatch):
    async with a_home(monkeypatch) as home:
        (service,), holding = home.services, home.holding
        assert home.states == [("joining", (2, 4), None), ("online", (2, 4), None)]
        assert [a.kv_tokens_free for a in home.swarm.said] == [0, 77]
        assert [a.queue_depth for a in home.swarm.said] == [0, 3]
        assert [a.decode_tps for a in home.swarm.said] == [1.0, 12.0]
        assert [a.seq for a in home.swarm.said] == [1_000_500_001, 1_000_500_002]
        assert (service.state, holding.sessions) == ("serving", 2)
        assert service.made == {
            "dtype": torch.float32,
            "device": CPU,
            "quant": "nf4",
            "kv_tokens": 100,
            "replay_log_tokens": 200,
            "compute": home,
            "connect": "connect",
            "measure": "measure",
            "report": holding._report,
        }
        assert service.server.adapters == {}
        speeds = {"decode": 12.0, "forward": 340.0}
        memory = {"weights": 5, "peak": 6}
        assert home.events == [Ready("own", (2, 4), "a model", speeds, memory, ())]
        assert home.rates == {(CONFIG, CPU, "float32", "nf4"): Rates(24.0, 680.0)}
        (beat,) = home.swarm.beats
        assert beat[0]().seq == 1_000_500_003
        assert beat[1]() == 77


async def test_what_is_announced(monkeypatch):
    async with a_home(monkeypatch) as home:
        said = home.swarm.said[-1]
        assert (said.peer_id, said.name, said.fingerprint) == ("own", "home", "f" * 32)
        assert (said.dtype, said.quant, said.max_context) == ("float32", "nf4", 2048)
        assert said.addrs == home.terms.addrs[:MAX_ADDRS]
        assert (said.issued_at, said.ttl_s, said.rtts) == (1000.5, 30.0, {"other": 0.5})
        assert (said.bandwidth, said.pinned, said.adapters) == (9.0, True, ())
        assert (said.decode_tps, said.forward_tps) == (12.0, 340.0)
        home.meter.bytes_per_s = math.inf
        assert home.holding.announcement().bandwidth == MAX_BANDWIDTH


async def test_who_intends_other_blocks_beats_once(monkeypatch):
    async with a_home(monkeypatch, None) as home:
        for blocks in ((0, 2), (2, 4)):
            await home.holding.intend(blocks)
        await trio.testing.wait_all_tasks_blocked()
        assert home.states == [("joining", (0, 2), None), ("joining", (2, 4), None)]
        assert len(home.swarm.beats) == 1
        assert home.swarm.beats[0][1]() == 0


@pytest.mark.parametrize("training", [False, True])
async def test_streams_are_refused_until_there_is_a_service(monkeypatch, training):
    async with a_home(monkeypatch, None) as home:
        handle = home.holding.handle_training if training else home.holding.handle
        theirs, ours = memory_frame_pair()
        await handle(ours)
        refused = {"type": "refused", "code": "joining", "why": "this node still loads its blocks"}
        assert (await theirs.receive()).header == refused
        assert await theirs.receive() is None
        await home.holding.intend((0, 2))
        assert not await home.holding.move((2, 4))
        await home.holding.load()
        await handle(ours)
        assert home.services[0].handled == [("training" if training else "hop", ours)]


async def test_what_others_say_is_a_first_guess(monkeypatch):
    async with a_home(monkeypatch, None) as home:
        home.swarm.known = [
            record("a", 2, 6, decode_tps=1.0, forward_tps=10.0),
            record("b", 3, 5, decode_tps=4.0, forward_tps=30.0),
            record("c", 7, 8, decode_tps=9.0, forward_tps=70.0),
        ]
        assert home.holding.expected_rates() == Rates(8.0, 60.0)
        await home.holding.intend((1, 5))
        said = home.swarm.said[-1]
        assert (said.decode_tps, said.forward_tps) == (2.0, 15.0)
        home.rates[CONFIG, CPU, "float32", "nf4"] = Rates(4e-4, 40e8)
        assert home.holding.expected_rates() == Rates(4e-4, 40e8)
        said = home.holding.announcement()
        assert (said.decode_tps, said.forward_tps) == (MIN_TPS, MAX_TPS)


async def test_a_move_exchanges_what_does_not_stay(monkeypatch, autojump_clock):
    async with a_home(monkeypatch) as home:
        (before,), moved = home.services, []

        async def move():
            moved.append(await home.holding.move((3, 6)))

        del home.swarm.said[:], home.events[:], home.rates[(CONFIG, CPU, "float32", "nf4")]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(move)
            await trio.sleep(MOVE_DRAIN_S - 1)
            assert home.events == [Moving((2, 4), (3, 6), 2)]
            assert home.states == [("draining", (2, 4), (3, 6))]
            assert (before.server.draining, before.told, len(home.services)) == (True, 1, 1)
            before.idle.set()
        after = home.services[1]
        assert moved == [True]
        assert home.states[1:] == [("joining", (3, 6), (3, 6)), ("online", (3, 6), None)]
        assert (after.blocks, after.keep.start, after.keep.end) == ((3, 6), 3, 4)
        assert (before.engine.span, before.server.adapters) == (after.keep, {})
        assert (home.holding.service, home.holding.blocks) == (after, (3, 6))
        await trio.testing.wait_all_tasks_blocked()
        assert (before.state, after.state) == ("ended", "serving")
        assert [type(event) for event in home.events] == [Moving, Ready]
        assert home.rates == {(CONFIG, CPU, "float32", "nf4"): Rates(36.0, 1020.0)}
        assert len(home.swarm.beats) == 1


async def test_a_move_that_sessions_do_not_allow_is_given_up(monkeypatch, autojump_clock):
    async with a_home(monkeypatch) as home:
        started = trio.current_time()
        assert await home.holding.move((4, 6)) is False
        assert trio.current_time() - started == MOVE_DRAIN_S
        assert home.states[2:] == [("draining", (2, 4), (4, 6)), ("online", (2, 4), None)]
        (service,) = home.services
        assert (service.server.draining, service.state) == (False, "serving")
        assert service.engine.span is service.span
        assert [type(event) for event in home.events] == [Ready, Moving]


async def test_blocks_that_cannot_be_loaded_leave_the_old_ones(monkeypatch):
    async with a_home(monkeypatch) as home:
        home.drained()
        home.damaged = {(3, 6)}
        assert await home.holding.move((3, 6)) is False
        before, again = home.services
        assert (again.blocks, again.keep.start, again.keep.end) == ((2, 4), 3, 4)
        assert home.states[2:] == [
            ("draining", (2, 4), (3, 6)),
            ("joining", (3, 6), (3, 6)),
            ("online", (2, 4), None),
        ]
        assert home.events[-1] == replace(home.events[0])
        await trio.testing.wait_all_tasks_blocked()
        assert (before.state, again.state) == ("ended", "serving")
        home.damaged = {(3, 6), (2, 4)}
        home.drained()
        with pytest.raises(ModelError):
            await home.holding.move((3, 6))


async def test_draining_waits_for_sessions_but_not_for_ever(monkeypatch, autojump_clock):
    async with a_home(monkeypatch) as home:
        (service,), started = home.services, trio.current_time()
        home.holding._moving_to = (4, 6)  # what was under way when the node was told to leave
        await home.holding.drain()
        assert trio.current_time() - started == DRAIN_DEADLINE_S
        assert home.events[1:] == [Draining(2)]
        assert home.states[2:] == [("draining", (2, 4), None)]
        assert (service.server.draining, service.told) == (True, 1)
        service.idle.set()
        await home.holding.drain()
        assert trio.current_time() - started == DRAIN_DEADLINE_S


async def test_a_goodbye_is_said_also_while_everything_is_cancelled(monkeypatch, autojump_clock):
    async with a_home(monkeypatch) as home:
        home.holding._moving_to = (4, 6)
        with trio.CancelScope() as scope:
            scope.cancel()
            await home.holding.leave()
        assert home.states[-1] == ("offline", (2, 4), None)
        home.swarm.stuck, started = True, trio.current_time()
        await home.holding.leave()
        assert trio.current_time() - started == GOODBYE_DEADLINE_S


async def test_adapters_are_offered_while_their_files_are_there(monkeypatch, tmp_path):
    places = ("law", "poem")
    async with a_home(monkeypatch, adapters=places, cache_dir=tmp_path) as home:
        holding = home.holding
        assert holding.adapter_bytes == 8
        assert home.loads == [("all", (2, 4)), ("blocks", (2, 4))]
        assert home.services[0].server.adapters == {"law": (2, 4), "poem": (2, 4)}
        assert [a.adapters for a in home.swarm.said] == [places, places]
        assert home.events[-1].adapters == places
        home.drained()
        assert await holding.move((3, 6))
        assert home.loads[2:] == [("remaining", (3, 6)), ("blocks", (3, 6))]
        assert home.services[1].server.adapters == {"poem": (3, 6)}
        assert (home.swarm.said[-1].adapters, home.events[-1].adapters) == (("poem",), ("poem",))


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [
        ((2, 6), (2, 6)),
        ((0, 8), (2, 6)),
        ((3, 4), (3, 4)),
        ((0, 3), (2, 3)),
        ((5, 8), (5, 6)),
        ((6, 8), (2, 2)),
        ((0, 2), (2, 2)),
    ],
)
def test_what_two_spans_share(blocks, kept):
    span = module.shared(a_span(2, 6), blocks)
    assert (span.start, span.end) == kept
    assert [span.loaded(n).block for n in range(*kept)] == list(range(*kept))
    assert (span.config, span.dtype, span.device) == (CONFIG, torch.float32, CPU)
