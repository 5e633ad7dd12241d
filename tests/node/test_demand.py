"""What a generation asks of its hops, and what becomes of peers that cannot give it."""

from contextlib import asynccontextmanager

import pytest
import torch

from petalnode.cli.arguments import parse_arguments
from petalnode.cli.generate import generate
from petalnode.demand import ROOM_AHEAD_TOKENS, demand
from petalnode.errors import NoRoute
from petalnode.events import ignore
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.peft_files import Adapter
from petalnode.models.tuning.tuning import NOTHING
from petalnode.routing.costs import Workload
from petalnode.session.added import Added
from petalnode.session.generation import GenerateOptions
from petalnode.simnet.world import open_world


@pytest.mark.parametrize(
    ("prompt", "new", "beams", "kv_tokens", "context"),
    [
        (10, 5, 1, 15, 15),
        (10, 1000, 1, 10 + ROOM_AHEAD_TOKENS, 1010),
        (10, 1000, 4, 4 * (10 + ROOM_AHEAD_TOKENS), 1010),
        (2000, 1000, 1, 2048, 2048),
        (5000, 1, 1, 2048, 2048),  # too long in any case: the session says so
    ],
)
def test_context_to_the_end_and_room_to_begin(prompt, new, beams, kv_tokens, context):
    options = GenerateOptions(max_new_tokens=new, num_beams=beams)
    assert demand(prompt, options, 2048) == Workload(kv_tokens=kv_tokens, context=context)


@pytest.mark.parametrize(
    ("prompt", "kv_tokens", "context"),
    [(7, 2 * 47, 107), (200, 2 * 240, 256), (255, 2 * 256, 256)],
)
def test_a_soft_prompt_is_room_in_every_row_and_context(prompt, kv_tokens, context):
    added = Added(prompt=torch.zeros(prompt, 4))
    workload = Workload(kv_tokens=2 * 40, context=100)
    assert added.asked_of(workload, 2, 256) == Workload(kv_tokens=kv_tokens, context=context)


async def test_the_command_asks_for_what_its_prompt_needs(monkeypatch):
    asked = []

    class Asked:
        """A node that remembers what a session should be for, and has no chain for it."""

        def open_session(self, _report, workload, **_):
            asked.append(workload)
            raise NoRoute("Nobody is there.")

    @asynccontextmanager
    async def open_nobody(*_):
        yield Asked()

    monkeypatch.setattr("petalnode.node.open_node", open_nobody)
    checkpoint = open_checkpoint("demo")
    flags = ["--max-new-tokens", "500", "--num-beams", "2", "--join", "pn1:x"]
    arguments = parse_arguments(["generate", "demo", "def main():", *flags], {})
    with pytest.raises(NoRoute):
        await generate(checkpoint, arguments, ignore)
    prompt = len(checkpoint.tokenizer().encode("def main():"))
    assert asked == [Workload(kv_tokens=2 * (prompt + ROOM_AHEAD_TOKENS), context=prompt + 500)]


@asynccontextmanager
async def near_and_far(path):
    """A client, a peer beside it that has room for few tokens, and another."""
    async with open_world(1, str(path)) as world:
        await world.start("near", blocks=(0, 4), kv_tokens=16)
        await world.start("far", blocks=(0, 4))
        client = await world.start("client")
        world.link("client", "far", latency_s=0.05)
        yield world, client


async def test_a_chain_without_room_for_the_soft_prompt_is_not_tried(
    tiny_checkpoint, autojump_clock
):
    async with near_and_far(tiny_checkpoint()) as (world, client):
        workload = demand(4, GenerateOptions(max_new_tokens=8), 256)
        for tokens, peer in ((4, "near"), (5, "far")):
            prompt = Adapter(NOTHING, torch.zeros(tokens, 64))
            async with client.open_session(workload=workload, adapter=prompt) as session:
                assert [world.name_of(hop.peer_id) for hop in session.chain.hops] == [peer]


async def test_a_chain_without_room_is_not_even_tried(tiny_checkpoint, autojump_clock):
    """The near peer is full: it refuses nobody, for it is not asked."""
    async with near_and_far(tiny_checkpoint()) as (world, client):
        asked = {}
        for prompt in (4, 80):
            workload = demand(prompt, GenerateOptions(max_new_tokens=8), 256)
            async with client.open_session(workload=workload) as session:
                asked[prompt] = [world.name_of(hop.peer_id) for hop in session.chain.hops]
        assert asked == {4: ["near"], 80: ["far"]}
        assert client.swarm.explain(workload)[world.peer_id("near")] == "no room for 88 tokens"
