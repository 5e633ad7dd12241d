"""Nodes that choose their blocks themselves, and move when they are needed. Simulated worlds."""

from contextlib import asynccontextmanager
from functools import partial
from itertools import permutations
from random import Random

import pytest
import trio

from petalnode.errors import ModelError
from petalnode.events import Moving, Ready
from petalnode.holding import MOVE_DRAIN_S, Holding
from petalnode.models import loading
from petalnode.placing import Balancer, choose_span
from petalnode.protocol import HOP_PROTOCOL, SESSION_ID_BYTES, Open
from petalnode.routing.rebalance import GAVE_UP_S, PATIENCE_HOLE_S
from petalnode.session.session import GenerateOptions
from petalnode.simnet.compute import Cost
from petalnode.simnet.world import open_world

from ..routing.records import record

FILLED_S = 15.0
"""From a death until its hole is filled."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return str(tiny_checkpoint(num_hidden_layers=8, eos_token_id=None))


@asynccontextmanager
async def a_world(checkpoint, seed=1):
    async with open_world(seed, checkpoint, latency_s=0.02, cost=Cost()) as world:
        yield world


def node(world, name):
    return world._members[name].node


def spans(world):
    return {name: member.node.blocks for name, member in world._members.items() if member.node}


def missing(world, name):
    return node(world, name).swarm.view.missing(trio.current_time())


async def until(condition, deadline_s):
    """Wait, in steps of virtual time, and say how long it took."""
    started = trio.current_time()
    with trio.fail_after(deadline_s):
        while not condition():  # noqa: ASYNC110 - virtual time
            await trio.sleep(0.1)
    return trio.current_time() - started


@pytest.mark.parametrize("sizes", sorted(set(permutations([5, 2, 1]))))
async def test_in_any_order_and_of_any_size_they_cover_the_model(checkpoint, sizes, autojump_clock):
    async with a_world(checkpoint) as world:
        for number, size in enumerate(sizes):
            await world.start(f"n{number}", num_blocks=size)
        await until(lambda: missing(world, "n0") == (), FILLED_S)
        covered = sorted(
            block for start, end in spans(world).values() for block in range(start, end)
        )
        assert covered == list(range(8))


@pytest.mark.parametrize("seed", range(4))
async def test_those_who_join_together_do_not_take_the_same_blocks(
    checkpoint, seed, autojump_clock
):
    async with a_world(checkpoint, seed) as world:
        await world.start("founder", num_blocks=2)
        moves = []
        async with trio.open_nursery() as nursery:
            for name in ("b", "c", "d"):

                async def start(name=name):
                    await world.start(name, num_blocks=2, report=moves.append)

                nursery.start_soon(start)
        assert sorted(spans(world).values()) == [(0, 2), (2, 4), (4, 6), (6, 8)]
        assert not [event for event in moves if isinstance(event, Moving)]


class Lockstep(Random):
    """No jitter: all wait alike."""

    def uniform(self, low, high):
        return low


class Newcomer:
    """A holding, and its view of a swarm where news take a moment."""

    num_blocks = 4

    def __init__(self, peer_id, everybody):
        self.terms = self
        self.peer_id = peer_id
        self.blocks = None
        self.seq = 0
        self.everybody = everybody

    def expected_rates(self):
        return None

    async def intend(self, blocks):
        self.blocks = blocks
        self.seq += 1
        await trio.sleep(0.1)
        start, end = blocks
        self.everybody[self.peer_id] = record(
            self.peer_id, start, end, state="joining", seq=self.seq
        )

    def others(self):
        return [a for a in self.everybody.values() if a.peer_id != self.peer_id]


async def test_of_those_who_choose_in_lockstep_the_smallest_id_stays(autojump_clock):
    everybody = {}
    newcomers = [Newcomer(name, everybody) for name in "abcd"]
    async with trio.open_nursery() as nursery:
        for one in newcomers:
            nursery.start_soon(choose_span, one, one, 1, Lockstep())
    assert [one.blocks for one in newcomers] == [(0, 1), (1, 2), (2, 3), (3, 4)]


async def test_a_hole_is_filled_by_one_that_can_be_spared(checkpoint, autojump_clock):
    """Not by the one that serves a session, whatever its id: it stays, and the session goes on."""
    async with a_world(checkpoint) as world:
        events = {name: [] for name in ("a", "b", "c", "d")}
        for name in events:
            await world.start(name, num_blocks=4, report=events[name].append)
        client = await world.start("client")
        await trio.sleep(5)
        held = spans(world)
        assert sorted(held.values(), key=str) == [(0, 4), (0, 4), (4, 8), (4, 8), None]
        async with client.open_session() as session:
            before = await some_tokens(session, [5, 6], 4)
            busy = world.name_of(session.chain.hops[0].peer_id)
            (spare,) = {name for name in events if held[name] == (0, 4)} - {busy}
            for name in events:
                if held[name] == (4, 8):
                    world.kill(name)
            await until(lambda: spans(world)[spare] == (4, 8), FILLED_S)
            await until(lambda: missing(world, busy) == (), 1.0)
            assert node(world, busy).blocks == (0, 4)
            after = await some_tokens(session, [7], 4)
            assert node(world, busy).service.server.sessions == 1
        whole = await world.start("whole", blocks=(0, 8))
        async with whole.open_session() as session:
            assert await some_tokens(session, [5, 6], 4) == before
            assert await some_tokens(session, [7], 4) == after
        assert [type(event) for event in events[spare]][-1] is Ready
        assert events[spare][-1].blocks == (4, 8)
        assert not [event for event in events[busy] if isinstance(event, Moving)]


@pytest.mark.parametrize("which", [0, 1])
async def test_who_has_sessions_leaves_the_move_to_who_has_none(checkpoint, which, autojump_clock):
    """Whichever of the two the plan names first."""
    async with a_world(checkpoint) as world:
        events = {name: [] for name in ("a", "b", "c", "d")}
        for name in events:
            await world.start(name, num_blocks=4, report=events[name].append)
        client = await world.start("client")
        await trio.sleep(5)
        lower = sorted(name for name in events if spans(world)[name] == (0, 4))
        busy, spare = lower[which], lower[1 - which]
        await open_hop(client, node(world, busy))
        for name in set(events) - set(lower):
            world.kill(name)
        await until(lambda: spans(world)[spare] == (4, 8), FILLED_S)
        assert not [event for event in events[busy] if isinstance(event, Moving)]
        assert node(world, busy).service.server.sessions == 1


async def some_tokens(session, ids, n):
    return [token.id async for token in session.generate(ids, GenerateOptions(max_new_tokens=n))]


async def test_a_node_whose_sessions_do_not_end_stays_until_they_do(checkpoint, autojump_clock):
    """Nobody else could fill the hole, so it tries; but no session is dropped for it."""
    async with a_world(checkpoint) as world:
        events = []
        served = await world.start("a", num_blocks=4, report=events.append)
        await world.start("b", blocks=(0, 4))
        client = await world.start("client")
        control = await open_hop(client, served)
        await until(lambda: events and isinstance(events[-1], Moving), FILLED_S)
        assert (events[-1].to, events[-1].sessions) == ((4, 8), 1)
        await trio.sleep(1)
        said = node(world, "b").swarm.view.get(served.peer_id, trio.current_time())
        assert (said.state, said.moving_to) == ("draining", (4, 8))
        await trio.sleep(MOVE_DRAIN_S)
        said = node(world, "b").swarm.view.get(served.peer_id, trio.current_time())
        assert (said.state, said.moving_to, said.pinned) == ("online", None, False)
        assert served.service.server.sessions == 1
        control.reset()
        await until(lambda: served.blocks == (4, 8), GAVE_UP_S + FILLED_S)


async def open_hop(client, served):
    """A session's control stream to one hop, which stays open whatever that hop says."""
    control = await client.open_stream(served.peer_id, HOP_PROTOCOL)
    start, end = served.blocks
    opening = Open(bytes(SESSION_ID_BYTES), served.checkpoint.fingerprint, start, end, 1)
    await control.send(opening.to_wire())
    assert (await control.receive()).header["type"] == "opened"
    return control


async def test_a_session_leaves_the_node_that_moves_and_goes_on(checkpoint, autojump_clock):
    async with a_world(checkpoint) as world:
        await world.start("c", blocks=(4, 8))
        mover = await world.start("a", num_blocks=4)
        client = await world.start("client")
        await trio.sleep(1)
        async with client.open_session() as session:
            assert world.name_of(session.chain.hops[0].peer_id) == "a"
            said = await some_tokens(session, [5, 6], 3)
            await world.start("b", blocks=(0, 4))
            await trio.sleep(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mover._holding.move, (4, 8))
                said += await some_tokens(session, [7], 40)
            assert mover.blocks == (4, 8)
            assert world.name_of(session.chain.hops[0].peer_id) == "b"
        whole = await world.start("whole", blocks=(0, 8))
        async with whole.open_session() as session:
            expected = await some_tokens(session, [5, 6], 3)
            assert said == expected + await some_tokens(session, [7], 40)


async def test_blocks_of_both_spans_are_loaded_once(checkpoint, autojump_clock, monkeypatch):
    loaded = []
    load = loading._load_block

    def counted(checkpoint, index, parts):
        loaded.append(index)
        return load(checkpoint, index, parts)

    monkeypatch.setattr(loading, "_load_block", counted)
    async with a_world(checkpoint) as world:
        moving = await world.start("a", num_blocks=4)
        assert loaded == [0, 1, 2, 3]
        assert await moving._holding.move((2, 6))
        assert loaded == [0, 1, 2, 3, 4, 5]
        whole = await world.start("b", blocks=(0, 8))
        del loaded[:]
        assert await moving._holding.move((0, 4))
        assert loaded == [0, 1]
        assert moving.blocks == (0, 4)
        assert whole.swarm.view.get(moving.peer_id, trio.current_time()).state == "online"


async def test_blocks_that_cannot_be_loaded_bring_the_old_ones_back(
    checkpoint, autojump_clock, monkeypatch
):
    load = loading._load_block

    def damaged(checkpoint, index, parts):
        if index == 5:
            raise ModelError("Block 5 is damaged.", "Download it again.")
        return load(checkpoint, index, parts)

    monkeypatch.setattr(loading, "_load_block", damaged)
    async with a_world(checkpoint) as world:
        moving = await world.start("a", num_blocks=4)
        assert not await moving._holding.move((2, 6))
        assert moving.blocks == (0, 4)
        (said,) = moving.swarm.live()
        assert (said.start, said.end, said.state, said.moving_to) == (0, 4, "online", None)
        assert not moving.service.server.draining
        await world.start("b", blocks=(4, 5))


async def test_a_node_that_still_loads_says_so(checkpoint, autojump_clock, monkeypatch):
    async with a_world(checkpoint) as world:
        await world.start("b", blocks=(0, 8))
        client = await world.start("client")
        joins = trio.Event()
        load = Holding.load

        async def load_later(holding):
            joins.set()
            await trio.sleep(1)
            await load(holding)

        monkeypatch.setattr(Holding, "load", load_later)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(world.start, "a", blocks=(0, 4)))
            await joins.wait()
            await until(lambda: len(client.swarm.live()) == 2, 1)
            control = await client.open_stream(world.peer_id("a"), HOP_PROTOCOL)
            header = (await control.receive()).header
            assert (header["type"], header["code"]) == ("refused", "joining")
            control.reset()


async def test_pinned_blocks_stay(checkpoint, autojump_clock):
    async with a_world(checkpoint) as world:
        for name in ("a", "b", "c"):
            await world.start(name, blocks=(0, 4))
        await trio.sleep(60)
        assert set(spans(world).values()) == {(0, 4)}
        assert all(a.pinned for a in node(world, "a").swarm.live())


class Busy:
    """A holding with a session, the swarm around it, and its computer."""

    num_blocks = 4
    sessions = 1

    def __init__(self, own_id, *idle):
        self.terms = self
        self.peer_id = own_id
        self.idle = idle
        self.moved = trio.Event()

    def live(self):
        return [record(peer_id, 0, 2) for peer_id in (*self.idle, self.peer_id)]

    async def run(self, function):
        return function()

    async def move(self, blocks):
        assert blocks == (2, 4)
        self.moved.set()
        return True


@pytest.mark.parametrize("own_id", ["busy", "z"])
@pytest.mark.parametrize("idle", [("idle",), ("idle", "idle2")])
async def test_a_hole_is_not_left_to_those_who_never_come(own_id, idle, autojump_clock):
    """They say that they could, for ever; they may be liars. Whoever the plan names first."""
    busy = Busy(own_id, *idle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Balancer(busy, busy, Random(1), busy).run)
        with trio.fail_after(FILLED_S):
            await busy.moved.wait()
        assert trio.current_time() > len(idle) * PATIENCE_HOLE_S
        nursery.cancel_scope.cancel()


async def test_a_hole_is_filled_in_time_although_the_first_in_turn_is_stuck(
    checkpoint, autojump_clock
):
    async with a_world(checkpoint) as world:
        for name in "abcdef":
            await world.start(name, num_blocks=4)
        await trio.sleep(5)
        held = spans(world)
        lower = sorted((world.peer_id(name), name) for name in held if held[name] == (0, 4))
        stuck, *others = [name for _, name in lower]
        assert len(others) == 2
        node(world, stuck)._balancing.cancel()  # it serves, but it never moves
        for name in set(held) - {stuck, *others}:
            world.kill(name)
        took_s = await until(lambda: (4, 8) in [spans(world)[name] for name in others], FILLED_S)
        await until(lambda: missing(world, stuck) == (), FILLED_S - took_s)
        assert took_s > PATIENCE_HOLE_S
        assert sorted(spans(world)[name] for name in others) == [(0, 4), (4, 8)]
        assert node(world, stuck).blocks == (0, 4)
