"""Adapters with beams, batches and turns, over hops that die, drain or refuse: nobody says less."""

import copy

import pytest
import torch
import trio
import trio.testing

from petalnode.holding import Holding
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.peft_files import Adapter, adapter_digest, save_adapter
from petalnode.session.session import GenerateOptions
from petalnode.simnet.compute import Cost
from petalnode.simnet.world import open_world

from .memory_swarm import open_memory_swarm
from .test_adapters import lora, prompted
from .test_chain import load_reference, prompt
from .test_recovery import SPANS, SPARES, Finder

NEW = 16
SOFT = torch.randn(3, 64, generator=torch.Generator().manual_seed(8)) * 0.3


@pytest.fixture
def path(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.fixture
def config(path):
    return open_checkpoint(str(path)).config


def expected(path, ids, tuning, num_beams):
    """What transformers says with the matrices merged into its weights."""
    model = copy.deepcopy(load_reference(path))
    for index, block in tuning.blocks.items():
        for site, pair in block.lora.items():
            layer = model.model.layers[index].get_submodule(site)
            layer.weight.data += pair.scale * pair.b @ pair.a
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=num_beams,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


async def nothing(swarm):
    pass


async def kill(swarm):
    swarm.kill("b")


async def kill_where_one_is_full(swarm):
    full = swarm.add("b3", 1, 2)  # which is asked first
    for peer in ("one", "another"):
        full.server.tunings.charge(peer, 0, full.server.tunings.peer_size)
    swarm.kill("b")


async def part(swarm):
    swarm.part("b", "c")


async def drain(swarm):
    await swarm.servers["c"].server.drain()
    await trio.testing.wait_all_tasks_blocked(0.02)


DISTURBANCES = [nothing, kill, kill_where_one_is_full, part, drain]


async def said(path, disturb, tuning, num_beams, soft=None):
    """A batch of two prompts, of which the chain is disturbed, and a turn after a rollback."""
    async with open_memory_swarm(path, [*SPANS, *SPARES]) as swarm:
        finder, rows = Finder(swarm), 2 * num_beams
        async with swarm.session(
            *SPANS, rows=rows, replacements=finder, tuning=tuning, soft_prompt=soft
        ) as session:
            session.tokenizer.eos_ids = frozenset()
            options = GenerateOptions(NEW, num_beams=num_beams)
            forward, steps = session.chain.forward, 0

            async def disturbed(*step):
                nonlocal steps
                steps += 1
                if steps == 5:
                    await disturb(swarm)
                return await forward(*step)

            session.chain.forward = disturbed
            batch = session.generate_batch([prompt(9), prompt(30)], options)
            async for _ in batch:
                pass
            turn = session.generate(prompt(12), options)
            tokens = [token.id async for token in turn]
            hops = [hop.peer_id for hop in session.chain.hops]
        await trio.testing.wait_all_tasks_blocked()
        for peer, one in swarm.servers.items():
            if peer != "b3":
                assert one.server.tunings.used == 0
        refused = [error for error in finder.blamed if error.peer_id == "b3"]
        assert [error.code for error in refused] == ["busy"] * (disturb is kill_where_one_is_full)
    return [*(one.tokens for one in batch.completions), tokens], hops


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("disturb", DISTURBANCES)
async def test_matrices(path, config, disturb, num_beams):
    tuning = lora(config, 1)
    tokens, hops = await said(path, disturb, tuning, num_beams)
    lengths = (9, 30, 12)
    assert tokens == [expected(path, prompt(n), tuning, num_beams) for n in lengths]
    changed = {nothing: "abcd", part: "abcd", drain: ["a", "b", "c2", "d"]}
    changed |= {kill: ["a", "b2", "c", "d"], kill_where_one_is_full: ["a", "b2", "c", "d"]}
    assert hops == list(changed[disturb])


@pytest.mark.parametrize("disturb", DISTURBANCES[1:])
async def test_prompts_before_the_text_and_in_every_block(path, config, disturb):
    tuning = prompted(lora(config, 1), 5)
    undisturbed, _ = await said(path, nothing, tuning, 3, SOFT)
    assert (await said(path, disturb, tuning, 3, SOFT))[0] == undisturbed
    assert undisturbed != (await said(path, nothing, tuning, 3))[0]


async def words(session):
    session.tokenizer.eos_ids = frozenset()
    return [token.id async for token in session.generate(prompt(9), GenerateOptions(NEW))]


@pytest.mark.parametrize("change", ["none", "gone", "other"])
async def test_a_node_that_moves_offers_what_is_still_there(
    tiny_checkpoint, tmp_path, change, autojump_clock
):
    path = tiny_checkpoint(eos_token_id=None)
    config = open_checkpoint(str(path)).config
    law, poems = tmp_path / "law", tmp_path / "poems"
    for place, seed in ((law, 1), (poems, 2)):
        save_adapter(place, Adapter(lora(config, seed), None), config, str(path))
    names = [f"{place.name}@{adapter_digest(place)}" for place in (law, poems)]
    async with open_world(1, str(path), latency_s=0.02, cost=Cost()) as world:
        both = (str(law), str(poems))
        node = await world.start("a", num_blocks=4, adapters=both)
        async with node.open_session(adapter="law") as session:
            before = await words(session)
        if change == "gone":
            (law / "adapter_model.safetensors").unlink()
        if change == "other":
            save_adapter(law, Adapter(lora(config, 3), None), config, str(path))
        assert await node._holding.move((1, 3))
        assert await node._holding.move((0, 4))
        (record,) = node.swarm.live()
        assert list(record.adapters) == (names if change == "none" else names[1:])
        assert list(node.service.server.adapters) == list(record.adapters)
        async with node.open_session(adapter=record.adapters[0]) as session:
            assert (await words(session) == before) is (change == "none")


async def test_what_a_span_offered_is_dropped_before_the_next_is_loaded(
    tiny_checkpoint, tmp_path, monkeypatch, autojump_clock
):
    """There may be no room for both."""
    path, before = str(tiny_checkpoint(eos_token_id=None)), []
    config, load = open_checkpoint(path).config, Holding._load_adapters
    save_adapter(tmp_path / "law", Adapter(lora(config, 1), None), config, path)

    async def loading(self, blocks):
        before.append(len(self.service.server.adapters) if self.service else None)
        return await load(self, blocks)

    monkeypatch.setattr(Holding, "_load_adapters", loading)
    async with open_world(1, path, latency_s=0.02, cost=Cost()) as world:
        node = await world.start("a", num_blocks=4, adapters=(str(tmp_path / "law"),))
        assert await node._holding.move((1, 3))
        assert len(node.service.server.adapters) == 1
    assert before == [None, 0]


async def test_what_a_node_will_offer_is_known_while_it_loads(
    tiny_checkpoint, tmp_path, monkeypatch, autojump_clock
):
    path = str(tiny_checkpoint(eos_token_id=None))
    config, known = open_checkpoint(path).config, []
    save_adapter(tmp_path / "law", Adapter(lora(config, 1), None), config, path)
    load = Holding._serve

    async def loading(self, *args):
        (record,) = self._swarm.live()
        known.append((record.state, [name.partition("@")[0] for name in record.adapters]))
        await load(self, *args)

    monkeypatch.setattr(Holding, "_serve", loading)
    async with open_world(1, path, latency_s=0.02, cost=Cost()) as world:
        await world.start("a", blocks=(0, 4), adapters=(str(tmp_path / "law"),))
    assert known == [("joining", ["law"])]
