"""Real nodes in a simulated world: latencies as the arithmetic says, and what deaths look like."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnode.errors import PetalnodeError, UsageError
from petalnode.events import Route
from petalnode.models.checkpoint import open_checkpoint
from petalnode.node import Node
from petalnode.p2p.yamux import PING_INTERVAL_S, SILENCE_LIMIT_S
from petalnode.probing import PROBE_DEADLINE_S
from petalnode.protocol import HOP_PROTOCOL
from petalnode.session.session import GenerateOptions
from petalnode.simnet.clock import run_virtual
from petalnode.simnet.compute import Cost
from petalnode.simnet.world import World, open_world

from ..models.reference import load_reference, reference_generate
from .chaos import chaos

PROMPT = [5, 6, 7]
LIMIT_S = 600.0
LOOK_S = 0.01  # between two looks at the views
COST = Cost(block_s=0.002, token_s=0.0001)
FRAME_HEADER_BYTES = 128  # at most: of one step, beside its tensor


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(str(tiny_checkpoint()))


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    torch.set_num_threads(1)
    return reference_generate(load_reference(tiny_checkpoint()), PROMPT, 30)


@asynccontextmanager
async def limited_world(*args: Any, **options: Any) -> AsyncIterator[World]:
    """A world that fails after some virtual minutes, instead of beating its heart for ever."""
    with trio.fail_after(LIMIT_S):
        async with open_world(*args, **options) as world:
            yield world


def now() -> float:
    return trio.current_time()


async def generate(client: Node, n: int = 30) -> tuple[list[int], list[float]]:
    """The greedy tokens, and the seconds that each took."""
    async with client.open_session() as session:
        options = GenerateOptions(max_new_tokens=n)
        tokens = [token async for token in session.generate(PROMPT, options)]
        return [token.id for token in tokens], [token.ms / 1000 for token in tokens]


async def start_chain(world: World, **more: tuple[int, int]) -> Node:
    for name, blocks in {"a": (0, 1), "b": (1, 3), "c": (3, 4), **more}.items():
        await world.start(name, blocks=blocks)
    return await world.start("client")


def seen_by(node: Node) -> set[str]:
    return {a.name for a in node.swarm.live() if a.state == "online"}


async def until_all_see(nodes: list[Node], names: set[str]) -> float:
    """The virtual time at which every view has exactly these nodes online."""
    with trio.fail_after(60):
        while not all(seen_by(node) == names for node in nodes):  # noqa: ASYNC110 - several views
            await trio.sleep(LOOK_S)
    return now()


async def test_exact_tokens_and_latencies_that_the_links_predict(
    checkpoint, expected, autojump_clock
):
    async with limited_world(1, checkpoint, cost=COST, latency_s=0.1) as world:
        client = await start_chain(world)
        tokens, seconds = await generate(client)
        assert tokens == expected
        # client > a > b > c > client, and each block once
        ways, blocks = 4 * 0.1, 4
        assert seconds[0] == pytest.approx(ways + blocks * (0.002 + 3 * 0.0001))
        assert seconds[1:] == pytest.approx([ways + blocks * (0.002 + 0.0001)] * 29)


async def test_unequal_links_add_up(checkpoint, expected, autojump_clock):
    async with limited_world(1, checkpoint, cost=COST, latency_s=0.01) as world:
        client = await start_chain(world)
        world.link("client", "a", latency_s=0.03, oneway=True)
        world.link("a", "b", latency_s=0.07, oneway=True)
        world.link("b", "c", latency_s=0.11, oneway=True)
        world.link("c", "client", latency_s=0.13, oneway=True)
        tokens, seconds = await generate(client, 5)
        assert tokens == expected[:5]
        assert seconds[1:] == pytest.approx([0.34 + 4 * 0.0021] * 4)


async def test_a_narrow_link_delays_a_prompt_by_its_bytes(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint, cost=COST, latency_s=0.01) as world:
        await world.start("a", blocks=(0, 4))
        client = await world.start("client")
        world.link("client", "a", bandwidth=1e5)
        async with client.open_session() as session:
            prompt = [n % 300 for n in range(200)]
            generation = session.generate(prompt, GenerateOptions(max_new_tokens=1))
            (seconds,) = [token.ms / 1000 async for token in generation]
        bytes_there = 200 * checkpoint.config.hidden_size * 4
        predicted = 2 * 0.01 + 4 * (0.002 + 200 * 0.0001) + bytes_there / 1e5
        # Framing, encryption, the way back of one token, and keepalive are beside it.
        assert predicted < seconds < predicted * 1.02
        carried = world.bytes_sent("client", "a", HOP_PROTOCOL)
        assert bytes_there < carried < bytes_there * 1.02
        assert world.bytes_sent("client", "a") > carried


async def test_every_byte_of_a_chain_is_counted_on_its_link(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint) as world:
        client = await start_chain(world)
        await generate(client, 10)
        tokens = len(PROMPT) + 9
        hidden_bytes = tokens * checkpoint.config.hidden_size * 4
        for source, target in (("client", "a"), ("a", "b"), ("b", "c")):
            carried = world.bytes_sent(source, target, HOP_PROTOCOL)
            assert hidden_bytes < carried < hidden_bytes + (10 + 3) * FRAME_HEADER_BYTES
        returned = 10 * checkpoint.config.hidden_size * 4
        assert returned < world.bytes_sent("c", "client", HOP_PROTOCOL) < returned + 1500
        for source, target in (("client", "b"), ("client", "c"), ("a", "client"), ("a", "c")):
            assert world.bytes_sent(source, target, HOP_PROTOCOL) < 500


async def test_a_slow_peer_costs_what_it_is_slower(checkpoint, expected, autojump_clock):
    async with limited_world(1, checkpoint, cost=COST, latency_s=0.01) as world:
        client = await start_chain(world)
        async with client.open_session() as session:
            options = GenerateOptions(max_new_tokens=10)
            seconds, tokens = [], []
            async for token in session.generate(PROMPT, options):
                seconds.append(token.ms / 1000)
                tokens.append(token.id)
                if len(tokens) == 5:
                    world.slow_down("b", 10.0)
        assert tokens == expected[:10]
        assert seconds[1:5] == pytest.approx([0.04 + 4 * 0.0021] * 4)
        assert seconds[5:] == pytest.approx([0.04 + 2 * 0.0021 + 2 * 0.021] * 5)


async def test_a_slow_peer_says_so_and_a_boaster_does_not(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint, cost=COST) as world:
        await world.start("fair", blocks=(0, 4))
        await world.start("slow", blocks=(0, 4), slowness=10.0)
        boaster = await world.start("boaster", blocks=(0, 4), slowness=10.0, boast=1000.0)
        await until_all_see([boaster], {"fair", "slow", "boaster"})
        said = {a.name: a.decode_tps for a in boaster.swarm.live()}
        assert said["fair"] == pytest.approx(1 / (4 * 0.0021))
        assert said["slow"] == pytest.approx(said["fair"] / 10)
        assert said["boaster"] == pytest.approx(said["fair"] * 100)


async def test_death_in_mid_sentence_and_a_new_session_after_the_return(
    checkpoint, expected, autojump_clock
):
    async with limited_world(1, checkpoint, latency_s=0.01) as world:
        client = await start_chain(world)
        said: list[int] = []

        async def talk() -> None:
            async with client.open_session() as session:
                async for token in session.generate(PROMPT):
                    said.append(token.id)
                    if len(said) == 10:
                        world.kill("b")

        with pytest.raises(PetalnodeError):
            await talk()
        assert said == expected[: len(said)]
        assert 10 <= len(said) <= 11
        again = await world.restart("b")
        assert again.peer_id == world.peer_id("b")
        await trio.sleep(1)
        await until_all_see([client, again], {"a", "b", "c"})
        assert (await generate(client))[0] == expected


async def test_a_rule_kills_at_a_byte_of_the_conversation(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint) as world:
        client = await start_chain(world)
        at = world.bytes_sent("a", "b") + 5000
        world.when(
            lambda parcel: (parcel.source, parcel.target) == ("a", "b") and parcel.total >= at,
            lambda parcel: world.kill("b", silent=True),
        )
        with pytest.raises(PetalnodeError), trio.fail_after(200):
            await generate(client)
        assert at <= world.bytes_sent("a", "b") < at + 5000
        assert world.network.rules == []


async def test_a_partition_of_a_second_costs_a_second_and_no_token(
    checkpoint, expected, autojump_clock
):
    async with limited_world(1, checkpoint, cost=COST, latency_s=0.01) as world:
        client = await start_chain(world)
        world.at(now() + 1.0, lambda: world.partition("b", "c", oneway=True, for_s=1.0))
        await trio.sleep(0.5)
        tokens, seconds = await generate(client, 30)
        assert tokens == expected
        stalled = [s for s in seconds if s > 0.1]
        assert len(stalled) == 1
        # TCP tries after 0.2, 0.6 and 1.4 s; the first try after the healing comes through.
        assert 0.6 < stalled[0] < 1.4 + 0.1


async def test_a_joiner_is_seen_by_all_within_ten_ways(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint, latency_s=0.05) as world:
        others = [await world.start(name, blocks=(0, 4)) for name in ("a", "b", "c")]
        client = await world.start("client")
        await trio.sleep(10)
        joiner = await world.start("d", blocks=(0, 4))
        online = now()
        seen = await until_all_see([*others, client, joiner], {"a", "b", "c", "d"})
        # Ten ways: opening gossip streams both ways, the records on them, and on from the contact.
        assert seen - online <= 10 * 0.05 + LOOK_S


async def test_a_goodbye_is_heard_by_all_after_one_way(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint, latency_s=0.05) as world:
        nodes = {n: await world.start(n, blocks=(0, 4)) for n in ("a", "b", "c", "d")}
        await trio.sleep(10)
        async with trio.open_nursery() as nursery:
            left = now()
            nursery.start_soon(world.stop, "d")
            del nodes["d"]
            assert await until_all_see(list(nodes.values()), {"a", "b", "c"}) == pytest.approx(
                left + 0.05, abs=2 * LOOK_S
            )


async def test_a_killed_program_is_out_of_every_view_after_a_reset_and_a_refusal(
    checkpoint, autojump_clock
):
    async with limited_world(1, checkpoint, latency_s=0.05) as world:
        nodes = {n: await world.start(n, blocks=(0, 4)) for n in ("a", "b", "c", "d")}
        await trio.sleep(10)
        world.kill("d")
        killed = now()
        del nodes["d"]
        gone = await until_all_see(list(nodes.values()), {"a", "b", "c"})
        assert gone - killed == pytest.approx(3 * 0.05, abs=2 * LOOK_S)


async def test_a_silent_death_is_out_of_every_view_when_its_last_record_expires(
    checkpoint, autojump_clock
):
    async with limited_world(1, checkpoint, latency_s=0.05) as world:
        nodes = {n: await world.start(n, blocks=(0, 4)) for n in ("a", "b", "c", "d")}
        await trio.sleep(10)
        world.kill("d", silent=True)
        killed = now()
        del nodes["d"]
        (last,) = (a for a in nodes["a"].swarm.live() if a.name == "d")
        gone = await until_all_see(list(nodes.values()), {"a", "b", "c"})
        # At the latest: the keepalive, and a probe that nobody answers, are sooner.
        assert killed < gone <= killed + last.ttl_s + 0.05 + LOOK_S
        sooner_s = SILENCE_LIMIT_S + PING_INTERVAL_S + PROBE_DEADLINE_S
        assert gone - killed <= sooner_s + 1.0


async def test_a_node_cut_off_from_all_expires_there_and_comes_back_when_it_heals(
    checkpoint, autojump_clock
):
    async with limited_world(1, checkpoint, latency_s=0.01) as world:
        nodes = {n: await world.start(n, blocks=(0, 4)) for n in ("a", "b", "c")}
        await trio.sleep(5)
        world.partition("c", for_s=40.0)
        await until_all_see([nodes["a"], nodes["b"]], {"a", "b"})
        await until_all_see([nodes["c"]], {"c"})
        await trio.sleep(40.0)
        await until_all_see(list(nodes.values()), {"a", "b", "c"})


async def test_clocks_half_a_minute_apart(checkpoint, expected, autojump_clock):
    async with limited_world(1, checkpoint) as world:
        await world.start("a", blocks=(0, 2), skew_s=30.0)
        await world.start("b", blocks=(2, 4), skew_s=0.0)
        client = await world.start("client", skew_s=15.0)
        await until_all_see([client], {"a", "b"})
        assert (await generate(client))[0] == expected


async def test_the_best_chain_of_a_world_is_reported(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint) as world:
        client = await start_chain(world, whole=(0, 4))
        await until_all_see([client], {"a", "b", "c", "whole"})
        events = []
        async with client.open_session(events.append):
            (route,) = [event for event in events if isinstance(event, Route)]
        assert [world.name_of(hop.peer_id) for hop in route.hops] == ["whole"]


async def test_misuse_is_told(checkpoint, autojump_clock):
    async with limited_world(1, checkpoint) as world:
        await world.start("a", blocks=(0, 4))
        with pytest.raises(UsageError, match="already"):
            await world.start("a", blocks=(0, 4))
        with pytest.raises(UsageError, match="no colour"):
            world.link("a", "b", colour=1.0)
        with pytest.raises(UsageError, match="4 blocks"):
            await world.start("b", blocks=(0, 5))


def another_process(path: Path, seed: int, hash_seed: str) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("chaos.py")
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(path), str(seed)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_the_same_seed_gives_the_same_world_in_any_process(tiny_checkpoint):
    path = tiny_checkpoint()
    processes = [another_process(path, 1, hash_seed) for hash_seed in ("1", "2")]
    here, said = run_virtual(lambda: chaos(str(path), 1), 1)
    assert len(said) > 6 * 3
    for process in processes:
        printed, errors = process.communicate(timeout=120)
        assert printed.strip() == f"{here} {said}", errors


def test_another_seed_gives_another_world(tiny_checkpoint):
    path = tiny_checkpoint()
    digests = {run_virtual(lambda s=seed: chaos(str(path), s), seed)[0] for seed in (1, 2)}
    assert len(digests) == 2
