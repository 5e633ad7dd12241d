"""Chains that lose hops: the tokens are those of an undisturbed run, whatever dies on the way."""

import pytest
import torch
import trio

from petalnode.errors import NoRoute, PeerRefused
from petalnode.serving.engine import RowWork
from petalnode.serving.rows import Refusal
from petalnode.session.avoided import AVOID_S, MAX_AVOID_S, Avoided
from petalnode.session.session import GenerateOptions

from .disturbances import NEW, SPANS, SPARES, Finder, checkpoint, generate, kill
from .memory_swarm import open_memory_swarm
from .test_chain import prompt, reference_tokens

__all__ = ["checkpoint"]

CHAIN = ("a", "b", "c", "d")


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
