"""Nodes among liars and wrong clocks, in simulated worlds."""

import pytest
import trio

from petalnode.p2p.envelope import MAX_RECORD_BYTES
from petalnode.p2p.gossip import PEER_BURST, PEER_MESSAGES_PER_S
from petalnode.routing.announcement import MAX_TPS
from petalnode.session.session import GenerateOptions
from petalnode.simnet.compute import Cost
from petalnode.simnet.world import open_world

from .test_swarm_world import KILLED_S, all_see, views


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return str(tiny_checkpoint(eos_token_id=None))


async def generate(client, n):
    """The names' peer ids of the chain at the beginning of a new session, and its tokens."""
    async with client.open_session() as session:
        first = [hop.peer_id for hop in session.chain.hops]
        ids = [t.id async for t in session.generate([5, 6], GenerateOptions(max_new_tokens=n))]
        return first, ids


async def test_who_boasts_is_found_out_by_what_is_measured(checkpoint, autojump_clock):
    cost = Cost(block_s=0.02)
    async with open_world(1, checkpoint, cost=cost) as world:
        await world.start("honest", blocks=(0, 4))
        await world.start("boaster", blocks=(0, 4), slowness=10.0, boast=1000.0)
        client = await world.start("client")
        await trio.sleep(1)
        names = []
        for _ in range(6):
            (first,), ids = await generate(client, 30)
            names.append(world.name_of(first))
            assert len(ids) == 30
        assert names[0] == "boaster"
        assert names[1:] == ["honest"] * 5
        boaster = world.peer_id("boaster")
        assert "slower" in client.swarm.explain()[boaster]


async def test_who_floods_hides_nobody_and_is_not_passed_on(checkpoint, autojump_clock):
    """A hundred records a second, each signed and in order."""
    names, seconds = ("a", "b", "c"), 20.0
    async with open_world(4, checkpoint, latency_s=0.02) as world:
        for name in (*names, "flooder"):
            await world.start(name, blocks=(0, 4))
        await trio.sleep(10)
        flooder = world._members["flooder"].node

        async def flood():
            while True:
                await flooder.swarm.gossip.publish(flooder._holding.announcement())
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            before = world.bytes_sent("a", "c")
            nursery.start_soon(flood)
            await trio.sleep(seconds)
            passed_on = world.bytes_sent("a", "c") - before
            await world.start("late", blocks=(0, 4))
            await trio.sleep(1)
            everybody = {*names, "flooder", "late"}
            assert views(world, names) == all_see(names, everybody)
            world.kill("b")
            await trio.sleep(KILLED_S)
            assert views(world, ("a", "c")) == all_see(("a", "c"), everybody - {"b"})
            nursery.cancel_scope.cancel()
        fair = PEER_BURST + PEER_MESSAGES_PER_S * seconds
        assert passed_on < fair * MAX_RECORD_BYTES / 2
        for name in ("a", "c"):
            refused = world._members[name].node.swarm.gossip.refused
            assert refused["flood"] + refused["rate"] > 100 * seconds - 2 * fair


async def test_clocks_thirty_seconds_apart_work(checkpoint, autojump_clock):
    async with open_world(2, checkpoint, latency_s=0.02) as world:
        await world.start("early", blocks=(0, 2), skew_s=-15.0)
        await world.start("late", blocks=(2, 4), skew_s=15.0)
        await world.start("right", blocks=(0, 4))
        client = await world.start("client", skew_s=15.0)
        await trio.sleep(60)
        assert len(client.swarm.live()) == 3
        _, expected = await generate(client, 5)
        world.kill("right")
        await trio.sleep(3)
        assert len(client.swarm.live()) == 2
        first, ids = await generate(client, 5)
        assert ([world.name_of(peer_id) for peer_id in first], ids) == (["early", "late"], expected)
        for name in ("early", "late", "client"):
            assert not {"future", "expired"} & set(world._members[name].node.swarm.gossip.refused)


async def test_nobody_is_kept_from_joining_by_what_another_claims(checkpoint, autojump_clock):
    """A newcomer without measurements guesses by the others, and its own record must be valid."""
    async with open_world(3, checkpoint, cost=Cost()) as world:
        boaster = await world.start("boaster", blocks=(0, 4), boast=5e4)
        claimed = boaster.swarm.live()[0].forward_tps
        assert claimed <= MAX_TPS < 4 * claimed
        node = await world.start("small", num_blocks=1)
        assert node.blocks is not None
