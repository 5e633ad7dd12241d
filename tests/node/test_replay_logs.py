"""Logs of what was sent, from which a replacement is brought up to date: whole, short, empty."""

import pytest
import torch
import trio

from petalnode.protocol import Replay, Segment, Step
from petalnode.replay import MIN_TOKENS, ReplayLog, replayed
from petalnode.serving.budget import KvBudget
from petalnode.session.session import GenerateOptions

from .disturbances import NEW, SPANS, SPARES, Finder, checkpoint, generate
from .memory_swarm import open_memory_swarm
from .test_chain import prompt, reference_tokens

__all__ = ["checkpoint"]

STALL_S = 60.0


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
