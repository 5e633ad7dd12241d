"""Adapters in generation: offered by nodes or brought by the client, whatever dies on the way."""

import copy
from contextlib import AsyncExitStack

import pytest
import torch
import trio
import trio.testing

from petalnode.errors import PeerRefused, UsageError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.peft_files import Adapter, adapter_digest, save_adapter
from petalnode.models.tuning.tuning import BlockTuning, LowRank, Tuning
from petalnode.node import NodeOptions, open_node
from petalnode.routing.costs import Workload
from petalnode.serving.adapters import find_offered
from petalnode.serving.session_tuning import TuningBudget
from petalnode.session.added import PLAIN, Added, offered_as
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .test_chain import TWO, load_reference, prompt
from .test_recovery import SPARES, Finder

NEW = 12
TARGETS = ("q_proj", "v_proj", "down_proj")


def lora(config, seed):
    """Matrices that change what is said."""
    generator = torch.Generator().manual_seed(seed)
    fresh = new_lora(config, rank=4, alpha=8, targets=TARGETS, rng=generator)
    return fresh.map(lambda tensor: torch.randn(tensor.shape, generator=generator) * 0.2)


def prompted(tuning, seed):
    """The same, and a prompt for every block."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {
        index: BlockTuning(block.lora, torch.randn(3, 64, generator=generator) * 0.3)
        for index, block in tuning.blocks.items()
    }
    return Tuning(blocks)


def expected(path, ids, tuning=None):
    """What transformers says with the matrices merged into its weights; greedy."""
    model = copy.deepcopy(load_reference(path))
    for index, block in (tuning.blocks if tuning else {}).items():
        for site, pair in block.lora.items():
            layer = model.model.layers[index].get_submodule(site)
            layer.weight.data += pair.scale * pair.b @ pair.a
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


async def say(session, ids, kill=None):
    session.tokenizer.eos_ids = frozenset()
    tokens = []
    async for token in session.generate(ids, GenerateOptions(NEW)):
        tokens.append(token.id)
        if kill is not None and len(tokens) == 4:
            kill()
    return tokens


@pytest.fixture
def path(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.fixture
def config(path):
    return open_checkpoint(str(path)).config


async def test_the_clients_own_also_at_a_replacement(path, config):
    ids, tuning = prompt(9), lora(config, 1)
    async with open_memory_swarm(path, [*TWO, *SPARES]) as swarm:
        finder = Finder(swarm)
        async with swarm.session(*TWO, replacements=finder, tuning=tuning) as session:
            tokens = await say(session, ids, lambda: swarm.kill("b"))
        assert finder.blamed
    assert tokens == expected(path, ids, tuning)
    assert tokens != expected(path, ids)


async def test_deep_prompts_at_a_replacement(path, config):
    ids, tuning = prompt(9), prompted(lora(config, 1), 5)
    async with open_memory_swarm(path, [*TWO, *SPARES]) as swarm:
        async with swarm.session(*TWO, tuning=tuning) as session:
            undisturbed = await say(session, ids)
        async with swarm.session(*TWO, replacements=Finder(swarm), tuning=tuning) as session:
            assert await say(session, ids, lambda: swarm.kill("b")) == undisturbed
    assert undisturbed != expected(path, ids, tuning)


async def test_offered_ones_share_batches_and_each_says_its_own(path, config):
    ids = prompt(9)
    offered = {name: lora(config, seed) for seed, name in enumerate(("one", "two"), 1)}
    said = {}
    async with open_memory_swarm(path, TWO) as swarm:
        for peer, start, end in TWO:
            adapters = {name: tuning.within(start, end) for name, tuning in offered.items()}
            swarm.servers[peer].server.adapters = adapters

        async def one(name, **added):
            async with swarm.session(*TWO, **added) as session:
                said[name] = await say(session, ids)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "")
            nursery.start_soon(lambda: one("one", adapter="one"))
            nursery.start_soon(lambda: one("two", adapter="two"))
            nursery.start_soon(lambda: one("own", tuning=lora(config, 3)))
    assert said.pop("") == expected(path, ids)
    assert said.pop("own") == expected(path, ids, lora(config, 3))
    assert said == {name: expected(path, ids, tuning) for name, tuning in offered.items()}


async def test_an_adapter_that_is_not_offered_is_refused(path):
    async with open_memory_swarm(path, TWO) as swarm:
        with pytest.raises(PeerRefused, match="does not offer that adapter"):
            async with swarm.session(*TWO, adapter="other"):
                pass


def bad(config, change):
    tuning = lora(config, 1)
    block = tuning.blocks[0]
    return Tuning({**tuning.blocks, 0: change(block)})


def changed(block, change):
    pairs = {site: LowRank(change(pair.a), pair.b, 1.0) for site, pair in block.lora.items()}
    return BlockTuning(pairs)


BAD = {
    "nan": lambda b: changed(b, lambda a: a * float("nan")),
    "inf": lambda b: changed(b, lambda a: a.index_fill(0, torch.tensor([1]), float("inf"))),
    "minus inf": lambda b: changed(b, lambda a: a.index_fill(0, torch.tensor([1]), -float("inf"))),
    "site": lambda b: BlockTuning({"mlp.router": next(iter(b.lora.values()))}),
    "shape": lambda b: changed(b, lambda a: a[:, 1:]),
    "prompt": lambda b: BlockTuning({}, torch.zeros(4, 63)),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
async def test_what_fits_no_block_is_refused_and_nothing_is_kept(path, config, change):
    async with open_memory_swarm(path, TWO) as swarm:
        with pytest.raises(PeerRefused, match="refused the adapter") as caught:
            async with swarm.session(*TWO, tuning=bad(config, change)):
                pass
        assert caught.value.code == "tuning"
        async with swarm.session(*TWO) as session:
            assert await say(session, prompt(9)) == expected(path, prompt(9))
        for one in swarm.servers.values():
            assert one.server.tunings.used == 0


async def test_limits_of_a_session_a_peer_and_a_node(path, config):
    tuning = lora(config, 1)
    half = tuning.within(0, 2).nbytes
    async with open_memory_swarm(path, TWO) as swarm:
        server = swarm.servers["b"].server
        server.tunings = TuningBudget(2 * half - 2)
        with pytest.raises(PeerRefused, match=r"larger than the 12.0 KiB that a session") as caught:
            async with swarm.session(*TWO, tuning=tuning):
                pass
        assert (caught.value.code, caught.value.peer_id) == ("tuning", "b")
        server.tunings = TuningBudget(2 * half)
        async with swarm.session(*TWO, tuning=tuning):
            with pytest.raises(
                PeerRefused, match=r"more than the 12.0 KiB that those of"
            ) as caught:
                async with swarm.session(*TWO, tuning=tuning):
                    pass
            assert (caught.value.code, caught.value.peer_id) == ("busy", "b")
            server.tunings.charge("another", 0, half)
            assert server.tunings.used == 2 * half
            server.tunings.charge("another", half, 1)
        await trio.testing.wait_all_tasks_blocked()
        async with swarm.session(*TWO, tuning=tuning) as session:
            assert await say(session, prompt(5)) == expected(path, prompt(5), tuning)


def test_names_of_offered_adapters():
    offered = {"law@00112233", "org/law@00112233", "poems@aaaaaaaa", "poems@bbbbbbbb"}
    assert offered_as("law", offered) == "law@00112233"
    assert offered_as("org/law", offered) == "org/law@00112233"
    assert offered_as("poems@bbbbbbbb", offered) == "poems@bbbbbbbb"
    assert offered_as("cooking", offered) == ""
    with pytest.raises(UsageError, match="poems@aaaaaaaa, poems@bbbbbbbb"):
        offered_as("poems", offered)
    with pytest.raises(UsageError, match=r"00000007 and 992 more\."):
        offered_as("poems", {f"poems@{number:08}" for number in range(1000)})
    assert offered_as("a@b", {"a@b@00112233", "a@00112233"}) == "a@b@00112233"


def test_a_directory_at_home_is_offered_by_its_name(config, tmp_path, monkeypatch):
    save_adapter(tmp_path / "mine", Adapter(lora(config, 1), None, "mine"), config, "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    (offered,) = find_offered(["~/mine"], config)
    assert offered.name == f"mine@{adapter_digest(tmp_path / 'mine')}"


def test_every_hop_is_asked_for_what_is_offered():
    workload = Workload(kv_tokens=5)
    assert Added("law@1").asked_of(workload, 1, 256) == Workload(kv_tokens=5, adapters=("law@1",))
    assert PLAIN.asked_of(workload, 1, 256) is workload


async def test_whole_nodes_offer_files_and_clients_bring_theirs(path, config, tmp_path):
    ids, served, own = prompt(9), lora(config, 1), lora(config, 2)
    for name, tuning in (("served", served), ("own", own)):
        save_adapter(tmp_path / name, Adapter(tuning, None, name), config, str(path))
    options = NodeOptions(
        host="127.0.0.1",
        blocks=(0, 4),
        identity=tmp_path / "key",
        adapters=(str(tmp_path / "served"),),
    )
    async with open_node(str(path), options) as node:
        (name,) = node.swarm.live()[0].adapters
        assert name == f"served@{adapter_digest(tmp_path / 'served')}"
        async with open_node(str(path), NodeOptions(join=(node.invite,))) as client:
            said = {}
            for adapter in ("served", name, str(tmp_path / "own"), ""):
                async with client.open_session(adapter=adapter) as session:
                    said[adapter] = await say(session, ids)
            with pytest.raises(UsageError, match=f"no node offers .*There are: {name}"):
                async with client.open_session(adapter="another"):
                    pass
    assert said["served"] == said[name] == expected(path, ids, served)
    assert said[str(tmp_path / "own")] == expected(path, ids, own)
    assert said[""] == expected(path, ids)


async def test_a_chain_is_made_of_those_who_offer_the_adapter(path, config, tmp_path):
    save_adapter(tmp_path / "law", Adapter(lora(config, 1), None, "law"), config, str(path))
    common = {"host": "127.0.0.1", "blocks": (0, 4)}
    async with AsyncExitStack() as stack:
        plain = NodeOptions(identity=tmp_path / "a", **common)
        first = await stack.enter_async_context(open_node(str(path), plain))
        law = NodeOptions(
            identity=tmp_path / "b",
            join=(first.invite,),
            adapters=(str(tmp_path / "law"),),
            **common,
        )
        second = await stack.enter_async_context(open_node(str(path), law))
        client = await stack.enter_async_context(
            open_node(str(path), NodeOptions(join=(second.invite,)))
        )
        async with client.open_session(adapter="law") as session:
            assert [hop.peer_id for hop in session.chain.hops] == [second.peer_id]


async def test_a_soft_prompt_cannot_be_offered(path, config, tmp_path):
    prompted = Adapter(Tuning(), torch.randn(3, 64), "style")
    save_adapter(tmp_path / "style", prompted, config, str(path))
    options = NodeOptions(
        host="127.0.0.1",
        blocks=(0, 4),
        identity=tmp_path / "key",
        adapters=(str(tmp_path / "style"),),
    )
    with pytest.raises(UsageError, match="soft prompt, which stays with the client"):
        async with open_node(str(path), options):
            pass
