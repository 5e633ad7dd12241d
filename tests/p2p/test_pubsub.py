"""What the mended GossipSub withstands, spoken to in raw RPCs over a real connection."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from petalnode.p2p.host import open_host
from petalnode.p2p.pubsub import MAX_BACK_OFF_S, MAX_IDS, MAX_RPC_BYTES, MESSAGES_BURST, tame

from .muxers import DEADLINE_S
from .records import identity, record
from .swarms import Member, open_member

MESHSUB = TProtocol("/meshsub/1.1.0")
MALLORY = identity(66)


@asynccontextmanager
async def attacked() -> AsyncIterator[tuple[Member, INetStream]]:
    """A member, and the stream of a peer that is connected to it and speaks raw GossipSub."""
    async with open_member(1) as member, open_host(MALLORY, listen=()) as mallory:
        await mallory.connect(member.host.addrs[0])
        member_id = ID.from_string(member.who.peer_id)
        stream = await mallory.libp2p.new_stream(member_id, [MESHSUB])
        with trio.fail_after(DEADLINE_S):
            yield member, stream


async def still_works(member: Member) -> None:
    """Another node joins the attacked one and is heard."""
    async with open_member(2, contacts=[member.host]) as friend:
        changed = trio.Event()
        member.view.on_change = changed.set
        await friend.gossip.publish(record(friend.who))
        await changed.wait()
        assert [a.peer_id for a in member.view.live(trio.current_time())] == [friend.who.peer_id]


async def ended(stream: INetStream) -> bool:
    with contextlib.suppress(BaseLibp2pError):
        while await stream.read(4096):
            pass
    return True


def packed(rpc: rpc_pb2.RPC) -> bytes:
    return encode_varint_prefixed(rpc.SerializeToString())


def message(member: Member, number: int = 1, **changes: object) -> rpc_pb2.Message:
    values = {
        "data": b"data",
        "topicIDs": [member.gossip.topic],
        "from_id": ID.from_string(MALLORY.peer_id).to_bytes(),
        "seqno": number.to_bytes(8, "big"),
        "signature": bytes(64),
    }
    return rpc_pb2.Message(**(values | changes))


@pytest.mark.parametrize(
    "garbage",
    [
        encode_varint_prefixed(b"\xff" * 100),
        b"\xff" * 30,  # a length prefix without end
        (b"\x80\x80\x80\x80\x08" + b"x" * 100),  # 2 GiB to come
        encode_varint_prefixed(b"x" * 10)[:5],
    ],
)
async def test_garbage_costs_its_stream_alone(garbage: bytes) -> None:
    async with attacked() as (member, stream):
        await stream.write(garbage)
        await stream.close()
        assert await ended(stream)
        await still_works(member)


BAD_MESSAGES: list[tuple[str, Callable[[Member], rpc_pb2.Message]]] = [
    ("signature", lambda m: message(m)),
    ("signature", lambda m: message(m, signature=b"")),
    ("publisher", lambda m: message(m, from_id=b"\x12\x20" + bytes(32), key=b"\xff" * 8)),
    ("publisher", lambda m: message(m, from_id=b"x" * 5000)),
    ("publisher", lambda m: message(m, seqno=b"")),
    # Right in length, but no key inside: libp2p's own check raises on it.
    ("signature", lambda m: message(m, from_id=b"\x00\x24" + b"\xff" * 36, key=b"\xff" * 8)),
    ("size", lambda m: message(m, data=bytes(5000))),
    ("topic", lambda m: message(m, topicIDs=[m.gossip.topic, "another"])),
    ("topic", lambda m: message(m, topicIDs=[])),
    ("echo", lambda m: message(m, from_id=ID.from_string(m.who.peer_id).to_bytes())),
]


@pytest.mark.parametrize("case", range(len(BAD_MESSAGES)))
async def test_a_bad_message_is_counted_and_the_service_lives(case: int) -> None:
    reason, make = BAD_MESSAGES[case]
    async with attacked() as (member, stream):
        await stream.write(packed(rpc_pb2.RPC(publish=[make(member)])))
        await still_works(member)
        assert member.gossip.refused == {reason: 1}


async def test_a_flood_is_cut_before_it_is_paid_for() -> None:
    count = int(MESSAGES_BURST) + 1000
    async with attacked() as (member, stream):
        flood = [message(member, n) for n in range(count)]
        await stream.write(packed(rpc_pb2.RPC(publish=flood)))
        await still_works(member)  # beside it
        await stream.close()
        await ended(stream)
        refused = member.gossip.refused
        assert refused["rate"] >= 800
        assert refused["rate"] + refused["signature"] == count


async def test_subscriptions_to_other_topics_leave_nothing() -> None:
    async with attacked() as (member, stream):
        for batch in range(20):
            topics = [f"topic {batch}.{n}" for n in range(16)]
            subs = [rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in topics]
            await stream.write(packed(rpc_pb2.RPC(subscriptions=subs)))
        await still_works(member)
        assert not any(topic.startswith("topic") for topic in member.gossip.pubsub.peer_topics)


async def test_control_for_other_topics_leaves_nothing_and_nobody_is_dialled() -> None:
    async with attacked() as (member, stream):
        control = rpc_pb2.ControlMessage()
        for n in range(100):
            control.prune.add(
                topicID=f"topic {n}", backoff=10**9, peers=[rpc_pb2.PeerInfo(peerID=b"x")]
            )
            control.graft.add(topicID=f"topic {n}")
        control.prune.add(topicID=member.gossip.topic, peers=[rpc_pb2.PeerInfo(peerID=b"x")])
        await stream.write(packed(rpc_pb2.RPC(control=control)))
        await still_works(member)
        router = member.gossip.pubsub.mesh_router
        assert set(router.back_off) <= {member.gossip.topic}
        assert set(router.mesh) == {member.gossip.topic}


def test_control_is_reduced_to_what_concerns_us() -> None:
    control = rpc_pb2.ControlMessage()
    control.graft.add(topicID="ours")
    control.graft.add(topicID="ours")
    control.graft.add(topicID="other")
    control.prune.add(topicID="ours", backoff=2**60, peers=[rpc_pb2.PeerInfo(peerID=b"x")])
    control.ihave.add(topicID="other", messageIDs=[b"id"])
    control.ihave.add(topicID="ours", messageIDs=[b"1", b"1", b"2", b"x" * 1000])
    control.iwant.add(messageIDs=[b"1"] * 1000)
    control.iwant.add(messageIDs=[b"2"])
    control.idontwant.add(messageIDs=[b"1"])
    expected = rpc_pb2.ControlMessage()
    expected.graft.add(topicID="ours")
    expected.prune.add(topicID="ours", backoff=MAX_BACK_OFF_S)
    expected.ihave.add(topicID="ours", messageIDs=[b"1", b"2"])
    expected.iwant.add(messageIDs=[b"1"])
    assert tame(control, "ours") == expected


def test_the_number_of_ids_is_capped() -> None:
    control = rpc_pb2.ControlMessage()
    control.iwant.add(messageIDs=[str(n).encode() for n in range(10 * MAX_IDS)])
    assert len(tame(control, "ours").iwant[0].messageIDs) == MAX_IDS


async def test_what_we_send_carries_no_address_record() -> None:
    async with open_member(1) as member, open_host(MALLORY, listen=()) as peer:
        heard = trio.Event()
        rpcs: list[rpc_pb2.RPC] = []

        async def listen(stream: INetStream) -> None:
            while not any(rpc.publish for rpc in rpcs):
                raw = await read_varint_prefixed_bytes_limited(stream, MAX_RPC_BYTES)
                rpcs.append(rpc_pb2.RPC.FromString(raw))
            heard.set()

        peer.libp2p.set_stream_handler(MESHSUB, listen)
        await peer.connect(member.host.addrs[0])
        stream = await peer.libp2p.new_stream(ID.from_string(member.who.peer_id), [MESHSUB])
        subscribe = rpc_pb2.RPC.SubOpts(subscribe=True, topicid=member.gossip.topic)
        await stream.write(packed(rpc_pb2.RPC(subscriptions=[subscribe])))
        with trio.fail_after(DEADLINE_S):
            await member.gossip.pubsub.wait_for_peer(ID.from_string(MALLORY.peer_id))
            await member.gossip.pubsub.wait_for_subscription(
                ID.from_string(MALLORY.peer_id), member.gossip.topic
            )
            await member.gossip.publish(record(member.who))
            await heard.wait()
        assert not any(rpc.HasField("senderRecord") for rpc in rpcs)
        (message,) = rpcs[-1].publish
        assert len(message.signature) == 64
        assert not message.key  # the id of its publisher has it
