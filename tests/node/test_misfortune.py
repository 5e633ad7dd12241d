"""Whatever happens to a session: its tokens are transformers', and only the dead are blamed."""

import os
import random

import pytest
import trio

from petalnode.p2p.memory import MemoryByteStream
from petalnode.session.session import GenerateOptions
from petalnode.simnet.clock import run_virtual

from .memory_swarm import open_memory_swarm
from .misfortune import NEW, Misfortune, VirtualCompute, slow_writes
from .test_beams import expected
from .test_chain import prompt, reference_tokens
from .test_recovery import SPANS, Finder

SEEDS = 20 * int(os.environ.get("PETALNODE_TEST_SEEDS", "1"))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_schedule(checkpoint, seed, monkeypatch):
    schedule = Misfortune(seed)
    monkeypatch.setattr(MemoryByteStream, "write", slow_writes(schedule.chance))
    monkeypatch.setattr("petalnode.session.recovery.DIRECT_S", 0.3)  # relays end, too
    tokens = run_virtual(lambda: schedule.run(checkpoint), seed)
    for ids, found in zip(schedule.prompts, tokens, strict=True):
        assert found == expected(checkpoint, ids, schedule.num_beams, NEW, ())
    assert schedule.wrongly_blamed() == []
    assert schedule.gaps == []


async def test_the_only_peer_is_asked_again(checkpoint, autojump_clock):
    """It refuses for a while; a session waits for it, rather than fail."""
    chance = random.Random(0)
    async with open_memory_swarm(checkpoint, SPANS) as swarm, trio.open_nursery() as nursery:
        finder = Finder(swarm)
        finder.patience_s = 30
        swarm.compute = VirtualCompute(chance)
        for server in swarm.servers.values():
            server.engine._compute = VirtualCompute(chance)

        async def refuse_for_a_while():
            swarm.servers["c"].server.draining = True
            session.chain.lines[2].control.reset()
            await trio.sleep(5)
            swarm.servers["c"].server.draining = False

        async with swarm.session(*SPANS, replacements=finder) as session:
            session.tokenizer.eos_ids = frozenset()
            tokens = []
            async for token in session.generate(prompt(20), GenerateOptions(NEW)):
                tokens.append(token.id)
                if len(tokens) == 5:
                    nursery.start_soon(refuse_for_a_while)
        assert 5 < trio.current_time() < 15
    assert tokens == reference_tokens(checkpoint, prompt(20), NEW)
