"""What one gossip message costs a node: bytes on the wire, CPU time, and where that goes.

A node stands between a peer that sends and one that listens, both in bare GossipSub on libp2p
streams. Per message it reads an RPC, checks the signatures, judges the record and sends it on. All
three run in this process, so the figures are a little too high.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass, field

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils import encode_varint_prefixed
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from petalnode.p2p.envelope import seal, unseal
from petalnode.p2p.gossip import open_gossip, topic_of
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import Identity, new_identity
from petalnode.p2p.mesh import ID_BYTES
from petalnode.p2p.pubsub_limits import Budgets
from petalnode.routing.announcement import Announcement, InvalidAnnouncement, rtt_key
from petalnode.routing.beats import ANNOUNCED_RTTS
from petalnode.routing.view import SwarmView

NETWORK, FINGERPRINT = "benchmark", "0123456789abcdef" * 2
TOPIC = topic_of(NETWORK, FINGERPRINT)
MESHSUB = TProtocol(PROTOCOL_ID_V11)
LISTEN = "/ip4/127.0.0.1/tcp/0"
DEADLINE_S = 60.0
RUNS = 5
MESSAGES = 300  # below what a forwarder may bring at once
TRANSPORT_BYTES = 12 + 18 + 52  # headers of yamux, Noise, TCP over IPv4
MAX_RPC_BYTES = 1 << 20
PARTS = {
    "signatures (PyNaCl)": ("nacl", "_sodium"),
    "addresses and ids (multiaddr, base58)": ("base58", "multiaddr", "netaddr", "varint"),
    "py-libp2p's pubsub": ("libp2p/pubsub",),
    "the rest of py-libp2p": ("libp2p/",),
    "records and views": ("routing/", "p2p/compact", "p2p/envelope", "msgpack"),
    "our gossip over it": ("p2p/pubsub", "p2p/mesh", "p2p/gossip", "p2p/offers"),
    "connections": ("p2p/",),
    "trio": ("trio/", "outcome", "select", "socket"),
    "Python's builtins": ("~",),
}
"""By what is in the names of a function and its file; the first that fits."""

OpenNode = Callable[[], AbstractAsyncContextManager[Host]]


@dataclass(frozen=True)
class Measured:
    """Seconds of CPU and bytes of one message; ``parts`` are shares of its CPU time."""

    cpu_s: float
    copy_cpu_s: float
    stock_cpu_s: float
    record_bytes: int
    message_bytes: int
    id_bytes: int
    rpc_bytes: int
    parts: dict[str, float]


def measure(count: int = MESSAGES) -> Measured:
    """All of it; takes seconds."""
    messages = [_message(number) for number in range(count + 1)]
    profile = cProfile.Profile()
    runs, stock = [], []
    for _ in range(RUNS):  # by turns: the machine may be busier now than later
        runs.append(trio.run(_pass_through, _our_node, messages, nullcontext()))
        stock.append(trio.run(_pass_through, _stock_node, messages, nullcontext()))
    trio.run(_pass_through, _our_node, messages, profile)
    new_s, copy_s = (statistics.median(each) for each in zip(*runs, strict=True))
    stock_s = statistics.median(new for new, _ in stock)
    offer = rpc_pb2.ControlMessage(ihave=[rpc_pb2.ControlIHave(topicID=TOPIC)])
    return Measured(
        cpu_s=new_s / count,
        copy_cpu_s=copy_s / count,
        stock_cpu_s=stock_s / count,
        record_bytes=len(messages[0].data),
        message_bytes=rpc_pb2.RPC(publish=[messages[0]]).ByteSize(),
        id_bytes=2 + ID_BYTES,
        rpc_bytes=rpc_pb2.RPC(control=offer).ByteSize() + TRANSPORT_BYTES,
        parts=_parts(profile),
    )


async def _pass_through(
    open_node: OpenNode, messages: list[rpc_pb2.Message], profiled: AbstractContextManager[object]
) -> tuple[float, float]:
    """CPU seconds for all ``messages`` but the last when they are new, and when they come again."""
    *first, last = [_packed(rpc_pb2.RPC(publish=[message])) for message in messages]
    with trio.fail_after(DEADLINE_S):
        async with open_node() as node, _open_peer(node, 1) as sender, _open_peer(node, 2) as ear:
            await ear.welcomed.wait()
            await sender.welcomed.wait()
            with profiled:
                new_s = await _time(sender.stream, first, ear, len(first))
            copy_s = await _time(sender.stream, [*first, last], ear, len(messages))
            return new_s, copy_s


async def _time(stream: INetStream, sent: list[bytes], ear: Peer, until: int) -> float:
    started = time.process_time()
    for raw in sent:
        await stream.write(raw)
    await ear.until_heard(until)
    return time.process_time() - started


@dataclass
class Peer:
    """Speaks bare GossipSub: sends on ``stream``, counts the messages that it is sent."""

    heard: int = 0
    welcomed: trio.Event = field(default_factory=trio.Event)
    stream: INetStream = field(init=False)
    _more: trio.Event = field(default_factory=trio.Event)

    async def listen(self, stream: INetStream) -> None:
        """Until the stream ends."""
        while True:
            raw = await read_varint_prefixed_bytes_limited(stream, MAX_RPC_BYTES)
            self.heard += len(rpc_pb2.RPC.FromString(raw).publish)
            self.welcomed.set()
            self._more.set()

    async def until_heard(self, count: int) -> None:
        """Until it was sent so many messages."""
        while self.heard < count:
            self._more = trio.Event()
            await self._more.wait()


@asynccontextmanager
async def _open_peer(node: Host, number: int) -> AsyncIterator[Peer]:
    peer = Peer()
    async with open_host(_identity(10_000 + number), listen=()) as host:
        host.libp2p.set_stream_handler(MESHSUB, peer.listen)
        await host.connect(node.addrs[0])
        peer.stream = await host.libp2p.new_stream(ID.from_string(node.peer_id), [MESHSUB])
        hello = rpc_pb2.RPC(
            subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)],
            control=rpc_pb2.ControlMessage(graft=[rpc_pb2.ControlGraft(topicID=TOPIC)]),
        )
        await peer.stream.write(_packed(hello))
        yield peer


@asynccontextmanager
async def _our_node() -> AsyncIterator[Host]:
    """A node that passes on whatever it is sent, at once."""
    async with (
        open_host(_identity(9999), listen=[LISTEN]) as host,
        open_gossip(
            host,
            _identity(9999),
            network=NETWORK,
            fingerprint=FINGERPRINT,
            view=SwarmView(),
        ) as gossip,
    ):
        gossip._pushes = Budgets(1e9, 1e9)
        yield host


@asynccontextmanager
async def _stock_node() -> AsyncIterator[Host]:
    """The same by py-libp2p's own GossipSub, which checks our records by a validator."""
    async with open_host(_identity(9999), listen=[LISTEN]) as host:
        router = GossipSub([MESHSUB], 4, 3, 8, heartbeat_interval=1, spam_protection_enabled=False)
        pubsub = Pubsub(host.libp2p, router)
        async with background_trio_service(router), background_trio_service(pubsub):
            await pubsub.wait_until_ready()
            view = SwarmView()
            pubsub.set_topic_validator(
                TOPIC, lambda _, message: _is_news(host, view, message), False
            )
            records = await pubsub.subscribe(TOPIC)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_drain, records)
                yield host
                nursery.cancel_scope.cancel()


async def _drain(records: object) -> None:
    while True:
        await records.get()  # type: ignore[attr-defined]


def _is_news(host: Host, view: SwarmView, message: rpc_pb2.Message) -> bool:
    try:
        said = unseal(message.data)
    except InvalidAnnouncement:
        return False
    host.learn(said.peer_id, said.addrs)
    return view.apply(said, trio.current_time(), message.data) == "new"


def _message(number: int) -> rpc_pb2.Message:
    """A record as its node publishes it."""
    identity = _identity(number)
    message = rpc_pb2.Message(
        data=seal(identity, _record(identity.peer_id, number)),
        topicIDs=[TOPIC],
        from_id=ID.from_string(identity.peer_id).to_bytes(),
        seqno=number.to_bytes(8, "big"),
    )
    message.signature = identity.sign(PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString())
    return message


def _record(peer_id: str, number: int) -> Announcement:
    """With all that a node in a large swarm says, and two addresses."""
    peers = [_identity(number + n).peer_id for n in range(1, ANNOUNCED_RTTS + 1)]
    return Announcement(
        peer_id=peer_id,
        name=f"machine-{number}",
        fingerprint=FINGERPRINT,
        start=20,
        end=40,
        state="online",
        decode_tps=41.7294,
        forward_tps=1893.113,
        kv_tokens_free=65_536,
        queue_depth=3,
        dtype="bfloat16",
        max_context=131_072,
        addrs=tuple(
            f"/ip4/{host}/tcp/4001/p2p/{peer_id}" for host in ("203.0.113.77", "192.168.1.20")
        ),
        seq=int(time.time() * 1e6) + number,
        issued_at=time.time(),
        ttl_s=3700.5,
        rtts={rtt_key(peer): 0.012345 * (n + 1) for n, peer in enumerate(peers)},
        bandwidth=11_812_345.6,
    )


def _identity(number: int) -> Identity:
    return new_identity(number.to_bytes(32, "big"))


def _packed(rpc: rpc_pb2.RPC) -> bytes:
    return encode_varint_prefixed(rpc.SerializeToString())


def _parts(profile: cProfile.Profile) -> dict[str, float]:
    """Shares of the time spent in functions themselves, the largest first."""
    shares: dict[str, float] = {}
    for (file, _, name), (_, _, own_s, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = f"{file} {name}"
        part = next((p for p, hints in PARTS.items() if any(h in where for h in hints)), "other")
        shares[part] = shares.get(part, 0.0) + own_s
    total = sum(shares.values())
    largest = sorted(shares, key=shares.__getitem__, reverse=True)
    return {part: shares[part] / total for part in largest}
