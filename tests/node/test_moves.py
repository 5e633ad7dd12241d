"""Hops that are left alive: full ones, slow ones, those that drain; nothing is lost by a move."""

import trio

from petalnode.errors import PeerRefused
from petalnode.serving.budget import KvBudget
from petalnode.session.session import GenerateOptions

from .disturbances import NEW, SPANS, SPARES, Finder, checkpoint
from .memory_swarm import open_memory_swarm
from .test_chain import prompt, reference_tokens

__all__ = ["checkpoint"]

IDLE_S = 60.0


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
                with trio.fail_after(IDLE_S):
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
            with trio.fail_after(IDLE_S):
                await swarm.servers["c"].server.wait_idle()
            assert [hop.peer_id for hop in session.chain.hops] == ["a", "b", "c2", "d"]
    assert tokens == reference_tokens(checkpoint, prompt(30), NEW)


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
            with trio.fail_after(IDLE_S):
                await swarm.servers["c"].server.wait_idle()
    assert tokens == reference_tokens(checkpoint, prompt(60), NEW)
    assert finder.blamed == []
    assert {event for event, _ in finder.events} == {None}
