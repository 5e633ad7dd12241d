"""Whole nodes in one process, over real libp2p on loopback."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from petalnode import swarm as swarm_module
from petalnode.errors import (
    InviteError,
    ListenError,
    NoRoute,
    PeerGone,
    PeerUnreachable,
    SwarmMismatch,
    UsageError,
)
from petalnode.events import Listening, Loading, Memory, Ready, Route, Waiting
from petalnode.node import NodeOptions, open_node
from petalnode.p2p.host import open_host
from petalnode.p2p.identity import new_identity
from petalnode.protocol import HOP_PROTOCOL
from petalnode.session.session import GenerateOptions

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def own_data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return str(tiny_checkpoint(eos_token_id=None))


def serving(**options):
    return NodeOptions(host="127.0.0.1", **options)


def joining(*nodes, **options):
    return NodeOptions(join=tuple(node.invite for node in nodes), **options)


@asynccontextmanager
async def open_nodes(checkpoint, *blocks):
    """A founder and joiners, one a block range."""
    async with AsyncExitStack() as stack:
        nodes = []
        for span in blocks:
            join = (nodes[0].invite,) if nodes else ()
            options = serving(blocks=span, join=join)
            nodes.append(await stack.enter_async_context(open_node(checkpoint, options)))
        yield nodes


async def greedy(node, ids, n, report=lambda event: None):
    async with node.open_session(report) as session:
        options = GenerateOptions(max_new_tokens=n)
        return [token.id async for token in session.generate(ids, options)]


async def until(swarm, condition):
    """Wait for changes of a node's view until the condition holds."""
    with trio.fail_after(DEADLINE_S):
        while not condition():
            await swarm.wait_changed()


async def test_a_client_generates_through_two_nodes_what_one_would(checkpoint):
    async with open_nodes(checkpoint, (0, 4)) as (whole,):
        expected = await greedy(whole, [5, 6, 7], 20)
    async with open_nodes(checkpoint, (0, 2), (2, 4)) as (founder, joiner):
        events = []
        async with open_node(checkpoint, joining(founder)) as client:
            assert await greedy(client, [5, 6, 7], 20, events.append) == expected
        hops = [(hop.peer_id, hop.blocks) for hop in events[-1].hops]
        assert hops == [(founder.peer_id, (0, 2)), (joiner.peer_id, (2, 4))]


async def test_a_serving_node_is_a_client_too_and_a_hop_of_its_own_chain(checkpoint):
    async with open_nodes(checkpoint, (0, 2), (2, 4)) as (founder, joiner):
        await until(founder.swarm, lambda: len(founder.swarm.live()) == 2)
        assert await greedy(founder, [5], 5) == await greedy(joiner, [5], 5)


async def test_events_come_in_order(checkpoint):
    events = []
    async with open_node(checkpoint, serving(blocks=(1, 3)), events.append) as node:
        kinds = [type(event) for event in events]
        assert kinds[:2] == [Listening, Memory]
        assert kinds[-1] is Ready
        assert set(kinds[2:-1]) == {Loading}
        assert events[-1].blocks == node.blocks == (1, 3)
        assert events[0].addrs[0].startswith("/ip4/127.0.0.1/tcp/")


async def test_joining_by_multiaddr(checkpoint):
    async with open_nodes(checkpoint, (0, 4)) as (founder,):
        (addr,) = founder.addrs
        async with open_node(checkpoint, NodeOptions(join=(addr,))) as client:
            assert len(await greedy(client, [5], 3)) == 3


async def test_without_blocks_the_least_covered_window_is_taken(checkpoint):
    async with open_nodes(checkpoint, (0, 2)) as (founder,):
        options = serving(join=(founder.invite,), num_blocks=2)
        async with open_node(checkpoint, options) as joiner:
            assert joiner.blocks == (2, 4)


async def test_a_session_waits_for_missing_blocks_and_goes_on_when_they_come(checkpoint):
    waiting, done = trio.Event(), trio.Event()

    def report(event):
        if isinstance(event, Waiting):
            assert "Blocks 2 to 3" in event.why
            waiting.set()

    async def generate(client):
        assert len(await greedy(client, [5], 4, report)) == 4
        done.set()

    async with (
        open_nodes(checkpoint, (0, 2)) as (founder,),
        open_node(checkpoint, joining(founder)) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(generate, client)
        await waiting.wait()
        late = serving(join=(founder.invite,), blocks=(2, 4))
        async with open_node(checkpoint, late):
            await done.wait()


async def test_blocks_that_nobody_brings_in_time(checkpoint, monkeypatch):
    monkeypatch.setattr(swarm_module, "WAIT_FOR_BLOCKS_S", 0.3)
    async with (
        open_nodes(checkpoint, (1, 3)) as (founder,),
        open_node(checkpoint, joining(founder)) as client,
    ):
        with pytest.raises(NoRoute, match="Block 0 and block 3 are served by nobody") as caught:
            await greedy(client, [5], 1)
        assert caught.value.missing == (0, 3)


async def test_goodbye_reaches_the_others_at_once(checkpoint):
    async with (
        open_nodes(checkpoint, (0, 4)) as (founder,),
        open_node(checkpoint, joining(founder)) as client,
    ):
        async with open_node(checkpoint, serving(blocks=(0, 2), join=(founder.invite,))) as leaver:
            await until(client.swarm, lambda: len(client.swarm.live()) == 2)
            gone = leaver.peer_id
        await until(client.swarm, lambda: len(client.swarm.live()) == 1)
        assert client.swarm.live()[0].peer_id == founder.peer_id
        assert gone != founder.peer_id


async def test_a_draining_node_is_refused_and_another_taken(checkpoint):
    events = []
    async with (
        open_nodes(checkpoint, (0, 4), (0, 4)) as nodes,
        open_node(checkpoint, joining(nodes[0])) as client,
    ):
        nodes[0].service.server.draining = True  # it says no, although its record says online
        nodes[1].service.server.draining = False
        assert len(await greedy(client, [5], 3, events.append)) == 3
        (route,) = [event for event in events if isinstance(event, Route)]
        assert [hop.peer_id for hop in route.hops] == [nodes[1].peer_id]


async def test_cancelling_frees_the_caches(checkpoint):
    async with (
        open_nodes(checkpoint, (0, 2), (2, 4)) as nodes,
        open_node(checkpoint, joining(nodes[0])) as client,
    ):
        free = [node.service.budget.tokens_free for node in nodes]
        with trio.CancelScope() as scope:
            async with client.open_session() as session:
                async for _ in session.generate([5, 6], GenerateOptions(max_new_tokens=50)):
                    scope.cancel()
        with trio.fail_after(DEADLINE_S):
            for node in nodes:
                await node.service.server.wait_idle()
        assert [node.service.budget.tokens_free for node in nodes] == free


async def test_another_model_under_the_same_name(tiny_checkpoint, tmp_path):
    ours, theirs = tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)
    for folder, path in (("a", ours), ("b", theirs)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model").symlink_to(path)
    async with open_nodes(str(tmp_path / "a" / "model"), (0, 4)) as (founder,):
        for join in (founder.invite, founder.addrs[0]):
            with pytest.raises(SwarmMismatch, match="fingerprint"):
                async with open_node(str(tmp_path / "b" / "model"), NodeOptions(join=(join,))):
                    pytest.fail("it joined")


async def test_a_port_in_use(checkpoint):
    async with open_nodes(checkpoint, (0, 4)) as (founder,):
        port = int(founder.addrs[0].split("/")[4])
        with pytest.raises(ListenError, match=str(port)):
            async with open_node(checkpoint, serving(blocks=(0, 4), port=port)):
                pytest.fail("it listens")


@pytest.mark.parametrize("options", [{"blocks": (0, 5)}, {"num_blocks": 5}])
async def test_more_blocks_than_there_are(checkpoint, options):
    with pytest.raises(UsageError, match="4"):
        async with open_node(checkpoint, serving(**options)):
            pytest.fail("it serves")


async def test_nobody_at_the_address(checkpoint):
    nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{new_identity().peer_id}"
    with pytest.raises(PeerUnreachable, match="No contact"):
        async with open_node(checkpoint, NodeOptions(join=(nobody,))):
            pytest.fail("it joined")


async def test_a_garbled_invite(checkpoint):
    with pytest.raises(InviteError):
        async with open_node(checkpoint, NodeOptions(join=("pn1:nonsense",))):
            pytest.fail("it joined")


async def test_a_peer_that_talks_garbage_loses_its_stream_and_the_node_goes_on(checkpoint):
    async with (
        open_nodes(checkpoint, (0, 4)) as (founder,),
        open_host(new_identity(), listen=()) as stranger,
    ):
        peer_id = await stranger.connect(founder.addrs[0])
        for garbage in (b"\xff" * 64, b"\x00\x00\x00\x01\xff\xff\xff\xff\x80", b"\x00" * 8):
            stream = await stranger.open_stream(peer_id, HOP_PROTOCOL)
            await stream._raw.write(garbage)
            with pytest.raises(PeerGone):
                await stream.receive()
        assert len(await greedy(founder, [5], 3)) == 3
        assert stranger.connected_peers() == [peer_id]
