"""What a hostile client or hop can cost a node, and whom an error may blame."""

import struct

import msgpack
import pytest
import torch
import trio

from petalnode.errors import PeerGone, PeerMisbehaved, UsageError
from petalnode.p2p.memory import memory_frame_pair
from petalnode.protocol import HOP_PROTOCOL, Segment, Step

from .memory_swarm import open_memory_swarm
from .test_cancellation import open_control, open_feed
from .test_chain import ONE, TWO, Garbler


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


async def test_a_strangers_first_frame_may_not_have_a_payload(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        stream = await swarm.open_stream("a", HOP_PROTOCOL)
        head = msgpack.packb({"type": "open", "_t": [["float32", [1, 64]]]})
        await stream._raw.write(struct.pack(">II", len(head), 256) + head)
        with pytest.raises(PeerGone):
            await stream.receive()
        assert isinstance(swarm.errors[0], PeerMisbehaved)


async def test_rolled_back_cache_counts_while_its_memory_is_held(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        budget = swarm.servers["a"].budget
        stream = await open_control(swarm)
        feed = await open_feed(swarm)
        for seq, n in enumerate((200, 1), start=1):
            await feed.send(Step(seq, (Segment(0, 0, n, 0),)).to_wire(), [torch.zeros(n, 64)])
            await stream.receive()
            assert budget.tokens_free == 100_000 - 200
        stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert budget.tokens_free == 100_000


async def test_a_hop_that_does_not_open_is_the_one_to_blame(checkpoint, autojump_clock):
    async with open_memory_swarm(checkpoint, TWO) as swarm:
        answering = swarm.open_stream

        async def open_stream(peer_id, protocol):
            mute = memory_frame_pair("client", "b")[0]
            return mute if peer_id == "b" else await answering(peer_id, protocol)

        swarm.open_stream = open_stream
        with pytest.raises(PeerGone) as caught:
            async with swarm.chain(*TWO):
                pytest.fail("it opened")
    assert caught.value.peer_id == "b"


async def test_a_hop_cannot_blame_a_stranger(checkpoint):
    lie = ({"type": "error", "code": "next", "why": "x", "peer": "honest"}, [])
    async with open_memory_swarm(checkpoint) as swarm, trio.open_nursery() as nursery:
        swarm.open_stream = Garbler(nursery, [lie]).open_stream
        with pytest.raises(PeerMisbehaved) as caught:
            async with swarm.chain(*ONE) as chain:
                await chain.forward([Segment(0, 0, 1, 1)], torch.zeros(1, 64))
    assert caught.value.peer_id == "a"


async def test_foreign_token_ids_do_not_poison_a_session(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE) as session:
        for ids in ([384], [-1]):
            with pytest.raises(UsageError, match="383"):
                session.append(ids)
        with pytest.raises(UsageError):
            await session.logits([])
        assert (await session.logits([5])).shape == (1, 384)
