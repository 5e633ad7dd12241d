"""Chains that lose hops: the tokens are those of an undisturbed run, whatever dies on the way."""

from collections.abc import Callable

import pytest
import torch
import trio

from petalnode.errors import NoRoute, PeerRefused
from petalnode.protocol import Replay, Segment, Step
from petalnode.replay import MIN_TOKENS, ReplayLog, replayed
from petalnode.routing.chain import Hop
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import RowWork
from petalnode.serving.rows import Refusal
from petalnode.session.avoided import AVOID_S, MAX_AVOID_S, Avoided
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .test_chain import prompt, reference_tokens

SPANS = [("a", 0, 1), ("b", 1, 2), ("c", 2, 3), ("d", 3, 4)]
CHAIN = ("a", "b", "c", "d")
SPARES = [(f"{peer}2", start, end) for peer, start, end in SPANS]
NEW = 24
LOOK_AGAIN_S = 0.5
STALL_S, LIMIT_S = 20.0, 60.0


class Finder:
    """Replacements among the servers of a memory swarm, the widest first."""

    def __init__(self, swarm, avoid=()):
        self.swarm, self.never = swarm, set(avoid)
        self.events, self.blamed = [], []
        self.came, self.slow, self.patience_s = trio.Event(), None, 5

    async def find(self, gap, avoid):
        start, end = gap.first, gap.last
        until = trio.current_time() + self.patience_s
        while True:
            hops, block = [], start
            while block < end:
                best = [
                    (min(s.engine.span.end, end), peer)
                    for peer, s in self.swarm.servers.items()
                    if s.engine.span.start <= block < s.engine.span.end
                    and peer not in avoid
                    and peer not in self.never
                ]
                if not best:
                    break
                stop, peer = max(best)
                hops.append(Hop(peer, block, stop))
                block = stop
            else:
                return hops
            left_s = until - trio.current_time()
            if left_s <= 0:
                raise NoRoute("Nobody serves these blocks.", "", tuple(range(start, end)))
            with trio.move_on_after(min(left_s, LOOK_AGAIN_S)):
                await self.came.wait()

    def observe(self, hop, took_s):
        assert 0 < took_s < 60

    def addrs(self, peer_id):
        return ()

    def is_slow(self, hop, took_s):
        return hop.peer_id == self.slow

    def blame(self, error):
        self.blamed.append(error)

    def report(self, event, hops):
        self.events.append((event, [hop.peer_id for hop in hops]))


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


async def generate(checkpoint, spans, hops, disturb: Callable, *, length=20, avoid=()):
    """Tokens of a session over ``hops``; ``disturb(swarm, position)`` is called at each token."""
    with trio.fail_after(LIMIT_S):
        return await disturbed(checkpoint, spans, hops, disturb, length, avoid)


async def disturbed(checkpoint, spans, hops, disturb, length, avoid):
    async with open_memory_swarm(checkpoint, spans) as swarm:
        finder = Finder(swarm, avoid)
        async with swarm.session(*hops, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(length), GenerateOptions(NEW)):
                tokens.append(token.id)
                disturb(swarm, len(tokens), session)
        await trio.testing.wait_all_tasks_blocked()
        for server in swarm.servers.values():
            assert server.budget.tokens_free == 100_000
            assert server.server.sessions == 0
    assert tokens == reference_tokens(checkpoint, prompt(length), NEW)
    return finder


def kill(*peers, at=5):
    def disturb(swarm, count, session):
        if count == at:
            for peer in peers:
                swarm.kill(peer)

    return disturb


@pytest.mark.parametrize("peers", ["a", "b", "d", "bc", "ac", "cd", "abcd"])
async def test_hops_die_between_tokens(checkpoint, peers):
    finder = await generate(checkpoint, [*SPANS, *SPARES], SPANS, kill(*peers))
    assert {peer for event, _ in finder.events for peer in event.lost} == set(peers)
    hops = finder.events[-1][1]
    assert {error.peer_id for error in finder.blamed} == set(peers)
    assert hops == [f"{peer}2" if peer in peers else peer for peer in CHAIN]


async def test_only_the_sender_of_the_dead_hop_replays(checkpoint):
    """The hops behind the dead one recompute nothing; those before it neither."""
    passed = {}

    def disturb(swarm, count, session):
        if count == 5:
            swarm.kill("c")
        passed[count] = {
            peer: server.engine.tokens for peer, server in swarm.servers.items() if peer in "abd"
        }

    await generate(checkpoint, [*SPANS, *SPARES], SPANS, disturb)
    for peer in "abd":
        assert passed[7][peer] - passed[5][peer] <= 3


async def test_one_replacement_for_two_and_two_for_one(checkpoint):
    wide = [*SPANS, ("bc", 1, 3)]
    finder = await generate(checkpoint, wide, SPANS, kill("b", "c"))
    assert list(dict.fromkeys(finder.events[-1][1])) == ["a", "bc", "d"]
    narrow = [("x", 0, 2), ("y", 2, 4), *SPANS]
    finder = await generate(checkpoint, narrow, [("x", 0, 2), ("y", 2, 4)], kill("y"))
    assert finder.events[0][1] == ["x", "c", "d"]


async def test_a_replacement_dies_too(checkpoint):
    spans = [*SPANS, *SPARES, ("b3", 1, 2), ("b4", 1, 2)]

    def disturb(swarm, count, session):
        if count in (5, 8, 11):
            swarm.kill(session.chain.hops[1].peer_id)

    finder = await generate(checkpoint, spans, SPANS, disturb)
    assert len(finder.events) == 3


async def test_death_during_prefill(checkpoint):
    """Of a prompt of four chunks; the reader of the dead hop has passed some of them on."""
    async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
        finder = Finder(swarm)
        async with swarm.session(*SPANS, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            engine = swarm.servers["c"].engine
            run = engine.run

            async def dies_in_the_second_chunk(start, end, rows, hidden):
                if rows[0].position:
                    swarm.kill("c")
                    await trio.sleep_forever()
                return await run(start, end, rows, hidden)

            engine.run = dies_in_the_second_chunk
            generation = session.generate(prompt(900), GenerateOptions(NEW))
            tokens = [token.id async for token in generation]
    assert tokens == reference_tokens(checkpoint, prompt(900), NEW)
    assert finder.events[0][0].lost == ["c"]


async def test_death_during_a_replay(checkpoint):
    """The sender dies while it brings a replacement up to date."""

    def disturb(swarm, count, session):
        if count == 5:
            swarm.kill("c")
            engine = swarm.servers["c2"].engine
            run = engine.run

            async def kill_the_sender(start, end, rows, hidden):
                swarm.kill("b")
                return await run(start, end, rows, hidden)

            engine.run = kill_the_sender

    finder = await generate(checkpoint, [*SPANS, *SPARES], SPANS, disturb, length=300)
    assert {error.peer_id for error in finder.blamed} >= {"b", "c"}


async def test_no_replacement_now(checkpoint):
    """It waits, and goes on when one joins."""
    async with open_memory_swarm(checkpoint, SPANS) as swarm, trio.open_nursery() as nursery:
        finder = Finder(swarm)

        async def join_later():
            await trio.testing.wait_all_tasks_blocked(0.05)
            swarm.add("late", 1, 2)
            finder.came.set()

        async with swarm.session(*SPANS, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(20), GenerateOptions(NEW)):
                tokens.append(token.id)
                if len(tokens) == 5:
                    swarm.kill("b")
                    nursery.start_soon(join_later)
    assert tokens == reference_tokens(checkpoint, prompt(20), NEW)
    assert "late" in finder.events[0][1]


async def test_nobody_ever_comes(checkpoint):
    async with (
        open_memory_swarm(checkpoint, SPANS) as swarm,
        swarm.session(*SPANS, replacements=Finder(swarm)) as session,
    ):
        session.chain.setup.replacements.patience_s = 0.01
        generation = session.generate(prompt(20), GenerateOptions(NEW))
        for _ in range(5):
            await anext(generation)
        swarm.kill("b")
        with pytest.raises(NoRoute):
            await anext(generation)


async def test_hops_that_do_not_reach_each_other_are_relayed(checkpoint):
    def disturb(swarm, count, session):
        if count == 5:
            swarm.part("b", "c")

    finder = await generate(checkpoint, SPANS, SPANS, disturb)
    assert finder.events[0][1] == list(CHAIN)


async def test_a_relayed_hop_dies(checkpoint):
    """And its sender after it, which is linked directly again."""

    def disturb(swarm, count, session):
        if count == 5:
            swarm.part("b", "c")
        if count == 10:
            swarm.kill("c")
        if count == 15:
            swarm.kill("b")

    finder = await generate(checkpoint, [*SPANS, *SPARES], SPANS, disturb)
    assert finder.events[-1][1] == ["a", "b2", "c2", "d"]


async def test_a_short_log_is_made_up_for_further_up(checkpoint):
    def short(swarm, count, session):
        if count == 1:
            for peer in ("a", "b"):
                (hop,) = swarm.servers[peer].server._sessions.values()
                hop._log._budget._capacity = hop._log._held
                hop._log._lengths[0] = 7 if peer == "b" else 3
                hop._log._buffers[0] = hop._log._buffers[0][:8]
        if count == 5:
            swarm.kill("c")

    await generate(checkpoint, [*SPANS, *SPARES], SPANS, short)


async def test_a_hop_that_is_full_is_left(checkpoint):
    async with open_memory_swarm(checkpoint, [("a", 0, 2)]) as swarm:
        swarm.add("small", 2, 4, kv_tokens=64)
        swarm.add("large", 2, 4)
        finder = Finder(swarm)
        chain = [("a", 0, 2), ("small", 2, 4)]
        async with swarm.session(*chain, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            generation = session.generate(prompt(60), GenerateOptions(NEW))
            tokens = [token.id async for token in generation]
            await trio.testing.wait_all_tasks_blocked()
            assert swarm.servers["small"].budget.tokens_free == 64
    assert tokens == reference_tokens(checkpoint, prompt(60), NEW)
    assert isinstance(finder.blamed[0], PeerRefused)


async def test_death_around_a_rollback(checkpoint):
    expected = reference_tokens(checkpoint, [*prompt(20)[:12], 5, 6], 10)
    async with (
        open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm,
        swarm.session(*SPANS, replacements=Finder(swarm)) as session,
    ):
        session.tokenizer.eos_ids = frozenset()
        async for _ in session.generate(prompt(20), GenerateOptions(10)):
            pass
        session.rollback(12)
        swarm.kill("c")
        again = session.generate([5, 6], GenerateOptions(10))
        assert [token.id async for token in again] == expected


async def test_a_draining_hop_is_left_while_it_serves(checkpoint):
    for peer in "abd":
        async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
            finder = Finder(swarm)
            async with swarm.session(*SPANS, replacements=finder) as session:
                session.tokenizer.eos_ids = frozenset()
                tokens = []
                async for token in session.generate(prompt(300), GenerateOptions(NEW)):
                    tokens.append(token.id)
                    if len(tokens) == 3:
                        await swarm.servers[peer].server.drain()
                        await trio.testing.wait_all_tasks_blocked(0.02)
                with trio.fail_after(2):
                    await swarm.servers[peer].server.wait_idle()
                assert f"{peer}2" in [hop.peer_id for hop in session.chain.hops]
        assert tokens == reference_tokens(checkpoint, prompt(300), NEW)
        assert finder.blamed == []


async def test_a_slow_hop_is_left(checkpoint):
    async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
        finder = Finder(swarm)
        finder.slow = "c"
        async with swarm.session(*SPANS, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(30), GenerateOptions(NEW)):
                tokens.append(token.id)
                session.chain._mender._look_at = 0
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert [hop.peer_id for hop in session.chain.hops] == ["a", "b", "c2", "d"]
    assert tokens == reference_tokens(checkpoint, prompt(30), NEW)


@pytest.mark.parametrize("kept", [0, 64])
@pytest.mark.parametrize("at", [3, 4, 5, 6, 9])
async def test_logs_that_end_anywhere(checkpoint, kept, at, monkeypatch):
    """All of them, also right where the text is: then the client's token ids are what is left."""
    monkeypatch.setattr("petalnode.session.chain.PATIENCE_S", 0.1)
    async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
        for server in swarm.servers.values():
            server.server._log_budget = KvBudget(kept, 1)
        finder = Finder(swarm)
        async with swarm.session(*SPANS, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(60), GenerateOptions(NEW)):
                tokens.append(token.id)
                if len(tokens) == at:
                    swarm.kill("c")
    assert tokens == reference_tokens(checkpoint, prompt(60), NEW)
    assert {error.peer_id for error in finder.blamed} == {"c"}


async def test_a_move_is_no_loss_and_needs_no_log(checkpoint):
    async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
        for server in swarm.servers.values():
            server.server._log_budget = KvBudget(0, 1)
        finder = Finder(swarm)
        async with swarm.session(*SPANS, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(60), GenerateOptions(NEW)):
                tokens.append(token.id)
                if len(tokens) == 3:
                    await swarm.servers["c"].server.drain()
                    await trio.testing.wait_all_tasks_blocked(0.02)
            with trio.fail_after(2):
                await swarm.servers["c"].server.wait_idle()
    assert tokens == reference_tokens(checkpoint, prompt(60), NEW)
    assert finder.blamed == []
    assert {event for event, _ in finder.events} == {None}


async def test_a_hop_that_lost_something_is_fed_anew(checkpoint):
    """Whoever lost it, the hop that says so is not to blame."""

    def forget(swarm, count, session):
        if count == 5:
            (hop,) = swarm.servers["c"].server._sessions.values()
            hop._rows._caches[0].truncate(3)

    finder = await generate(checkpoint, SPANS, SPANS, forget)
    assert finder.blamed == []
    assert finder.events[0][1] == list(CHAIN)


async def test_a_hop_that_always_lacks_something_is_left(checkpoint):
    def spoil(swarm, count, session):
        if count == 5:
            (hop,) = swarm.servers["c"].server._sessions.values()

            def prepare(step):
                raise Refusal("gap", "something is missing")

            hop._rows.prepare = prepare

    finder = await generate(checkpoint, [*SPANS, *SPARES], SPANS, spoil)
    (refused,) = finder.blamed
    assert isinstance(refused, PeerRefused)
    assert finder.events[-1][1] == ["a", "b", "c2", "d"]


async def test_a_relay_with_logs_that_keep_nothing(checkpoint):
    """What cannot be relayed from a log comes from further up."""

    def part(swarm, count, session):
        if count == 1:
            for server in swarm.servers.values():
                server.server._log_budget._capacity = 0
                for hop in server.server._sessions.values():
                    hop._log.drop()
        if count == 5:
            swarm.part("b", "c")
        if count == 10:
            swarm.kill("c")

    with trio.fail_after(STALL_S):
        finder = await generate(checkpoint, [*SPANS, *SPARES], SPANS, part)
    assert [error.peer_id for error in finder.blamed] == ["c"]


async def test_the_sender_stays_when_others_may_feed_too(checkpoint):
    """Those who are about to take over may change their minds."""
    async with open_memory_swarm(checkpoint, SPANS) as swarm, swarm.session(*SPANS) as session:
        for peer in ("x", "y"):
            await session.chain.lines[1].expect_also(peer)
        (hop,) = swarm.servers["b"].server._sessions.values()
        assert hop.senders == ("a", "y")


async def test_no_hop_is_left_open_when_another_is_not_found(checkpoint):
    """Two runs of hops are lost; there is a replacement for the first alone."""
    async with open_memory_swarm(checkpoint, [*SPANS, SPARES[0]]) as swarm:
        finder = Finder(swarm)
        finder.patience_s = 0.01
        async with swarm.session(*SPANS, replacements=finder) as session:
            generation = session.generate(prompt(20), GenerateOptions(NEW))
            await anext(generation)
            swarm.kill("a")
            swarm.kill("c")
            with pytest.raises(NoRoute):
                await anext(generation)
        await trio.testing.wait_all_tasks_blocked()
        assert swarm.servers["a2"].server.sessions == 0


async def test_who_is_avoided(autojump_clock):
    avoided = Avoided()
    for_s = []
    for _ in range(6):
        avoided.add(PeerRefused("no", "", "x", "busy"))
        avoided.add(PeerRefused("again", "", "x", "busy"))  # the same failure
        assert list(avoided) == ["x"]
        assert avoided["x"].cause == "no"
        since = trio.current_time()
        while "x" in avoided:  # noqa: ASYNC110 - virtual time
            await trio.sleep(0.5)
        for_s.append(trio.current_time() - since)
        assert len(avoided) == 0
    assert for_s == [2, 4, 8, 16, MAX_AVOID_S, MAX_AVOID_S]
    assert list(avoided.beside(PeerRefused("left", "", "y", "leaving"))) == ["y"]
    await trio.sleep(MAX_AVOID_S)
    avoided.add(PeerRefused("no", "", "x", "busy"))
    await trio.sleep(AVOID_S)
    assert "x" not in avoided


def of(*rows, order=(), seq=1, as_of=0):
    """A step of (position, n) for each row."""
    segments = tuple(Segment(row, position, n, 0) for row, (position, n) in enumerate(rows) if n)
    return Step(seq, segments, order=order, as_of=as_of)


def test_a_log_knows_whether_it_is_complete():
    log = ReplayLog(1, KvBudget(64, 1))
    log.record(of((0, 60)), torch.zeros(60, 2))
    assert (log.length(0), log.complete) == (60, True)
    log.record(of((60, 10)), torch.zeros(10, 2))
    assert (log.length(0), log.complete) == (60, False)
    log.record(of((70, 1)), torch.zeros(1, 2))
    assert (log.length(0), log.complete) == (60, False)
    log.record(of((5, 3)), torch.zeros(3, 2))  # rolled back to where it holds everything
    assert (log.length(0), log.complete) == (8, True)


def test_a_log_that_is_rearranged():
    budget = KvBudget(200, 1)
    log = ReplayLog(3, budget)
    states = torch.arange(40.0).reshape(20, 2)
    log.record(of((0, 10), (0, 10)), states)
    log.record(of((10, 1), (10, 1), (10, 1), order=(1, 1, 0), seq=2), torch.ones(3, 2))
    assert [log.length(row) for row in range(3)] == [11, 11, 11]
    assert log.complete
    assert [log._buffers[row][0, 0].item() for row in range(3)] == [20, 20, 0]
    assert budget.used == log._held == 3 * MIN_TOKENS
    log.record(of((11, 1), (11, 1), (11, 1), order=(0, 0, 0), seq=3), torch.ones(3, 2))
    assert log.complete
    log.drop()
    assert budget.used == 0


def test_a_log_without_room_for_a_copy_is_not_complete():
    log = ReplayLog(2, KvBudget(MIN_TOKENS, 1))
    log.record(of((0, 10)), torch.zeros(10, 2))
    log.record(of((10, 1), (10, 1), order=(0, 0), seq=2), torch.zeros(2, 2))
    assert [log.length(row) for row in range(2)] == [11, 0]
    assert not log.complete


async def test_a_replay_of_what_is_rolled_back_meanwhile():
    log = ReplayLog(1, KvBudget(1000, 1))
    log.record(of((0, 256)), torch.zeros(256, 2))
    log.record(of((256, 100)), torch.zeros(100, 2))
    taken = []
    async for step, hidden in replayed(log, Replay((0,), (356,))):
        taken.append((step.segments[0].position, len(hidden)))
        log.record(of((20, 250), seq=2), torch.ones(250, 2))
    assert taken == [(0, 256), (256, 14)]


async def test_a_caller_that_leaves_at_once_leaves_no_turn_behind(checkpoint, caplog):
    async with open_memory_swarm(checkpoint, SPANS[:1]) as swarm:
        engine = swarm.servers["a"].engine
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            row = RowWork(engine.span.new_row(0, 1), 0, 1)
            await engine.run(0, 1, [row], torch.zeros(1, engine.span.config.hidden_size))
        await trio.testing.wait_all_tasks_blocked()
    assert caplog.records == []
