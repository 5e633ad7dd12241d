"""py-libp2p 0.8.1's GossipSub as petalnode runs it: one topic, mended, and closed to abuse.

On the wire it is GossipSub 1.1 with strict signing, readable by go-libp2p and js-libp2p. 1.2 only
adds IDONTWANT, which costs one more message per link and pays for large payloads, not for records.
Everything below goes through constructor arguments, public attributes and overridden methods:

- stock spawns a service task per incoming message, and finding each task's parent walks all tasks:
  one RPC of many small messages stalls the loop for seconds, and an error in one of these tasks
  (a malformed public key is enough) ends the service. Here a peer's messages are handled one after
  the other in its reader task, which also is the back-pressure.
- stock drops at 10 messages/s after it has paid for them; here a budget per forwarder comes first.
- stock verifies and stores the sender's signed address record with every RPC, twice when there is
  control. Nobody here needs it, so it is neither sent nor read.
- stock answers repeated ids in one IWANT with as many copies, keeps back-offs for any topic name,
  and dials whatever a PRUNE suggests. Here only what concerns our topic gets through, capped.
- stock repeats our public key in every message, though our id has it.
- seqnos start at the wall clock in microseconds, not seconds: a quick restart cannot repeat one.
- stock tries once to reach a peer that connects, and never again if that peer has no gossip yet.
  Here the dialling side opens the first stream, and the other side answers with its own.
- messages are pushed or only offered, as their judge decides (``mesh``).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, islice
from random import Random
from typing import Literal, cast

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX, signature_validator
from libp2p.tools.timed_cache.last_seen_cache import LastSeenCache
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from petalnode.p2p.mesh import Router, id_of
from petalnode.p2p.pubsub_limits import Budgets, SeenMessages

MAX_BACK_OFF_S = 600
MAX_RPC_BYTES = 1024 * 1024  # libp2p's own limit; an answer to IWANT may be that long
MAX_IDS = 256  # message ids that one RPC may offer or want
MAX_ID_BYTES = 128
MAX_SUBSCRIPTIONS = 16  # in one RPC; other topics than ours are ignored
MESSAGES_PER_S = 100.0  # new messages that one forwarder may bring
MESSAGES_BURST = 400.0
FLUSH_POLL_S = 0.01
_ED25519_ID_BYTES = 38
_SIGNATURE_BYTES = 64

Passing = Literal["push", "offer", ""]
"""How a message goes on: whole and at once, by its id with the next beat, or not at all."""
Accept = Callable[[bytes, str], Passing]
"""Called with the payload and the publisher's peer id."""


class OneTopicPubsub(Pubsub):
    """Pubsub for ``topic`` alone. ``refused`` counts what was turned away, by reason."""

    def __init__(
        self,
        host: IHost,
        topic: str,
        accept: Accept,
        *,
        first_seqno: int,
        max_data_bytes: int,
        rng: Random,
    ) -> None:
        self.refused: Counter[str] = Counter()
        self._topic = topic
        self._accept = accept
        self._max_data_bytes = max_data_bytes
        self._messages = Budgets(MESSAGES_PER_S, MESSAGES_BURST)
        self._writing: set[ID] = set()
        self._meeting: dict[ID, trio.Lock] = {}
        self.mesh_router = Router(rng)
        super().__init__(
            host,
            self.mesh_router,
            msg_id_constructor=id_of,
            max_subscriptions_per_rpc=MAX_SUBSCRIPTIONS,
            max_inbound_rpc_size=MAX_RPC_BYTES,
            allowed_topics={topic},
        )
        self.counter = first_seqno
        self.seen_messages.stop()
        self.seen_messages = cast(LastSeenCache, SeenMessages())

    async def flush(self) -> None:
        """Wait until all that was queued is written. The caller sets the deadline."""
        while self._writing or any(map(len, self.peer_queues.values())):  # noqa: ASYNC110 - closing
            await trio.sleep(FLUSH_POLL_S)

    def forget_strangers(self) -> None:
        """Forget what is remembered of peers that are no longer connected."""
        self._messages.keep_only(self.peers)
        self.mesh_router.keep_only(self.peers)

    async def handle_peer_queue(self) -> None:
        """Open a stream to each peer that we dial; a peer that dials us opens the first one."""
        async with self.peer_receive_channel:
            self.event_handle_peer_queue_started.set()
            async for peer_id in self.peer_receive_channel:
                connections = self.host.get_network().get_connections(peer_id)
                if any(connection.muxed_conn.is_initiator for connection in connections):
                    self.manager.run_task(self.ensure_peer_stream, peer_id)

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """Handle what one peer sends until its stream ends; drop the stream if it is garbage."""
        peer_id = stream.muxed_conn.peer_id
        await self.wait_until_ready()
        try:
            if self.manager.is_running:
                self.manager.run_task(self.ensure_peer_stream, peer_id)
            while self.manager.is_running:
                raw = await read_varint_prefixed_bytes_limited(stream, MAX_RPC_BYTES)
                await self._handle_rpc(peer_id, rpc_pb2.RPC.FromString(raw))
        except DecodeError:
            self.refused["rpc"] += 1
        except BaseLibp2pError:
            pass  # the stream ended, one way or another
        with contextlib.suppress(BaseLibp2pError):
            await stream.reset()

    async def _handle_new_peer(self, peer_id: ID) -> None:
        # Stock looks whether the peer is registered, then waits: two at once would both register.
        lock = self._meeting.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                await super()._handle_new_peer(peer_id)
                # Stock offers what was said meanwhile only if the peer subscribes after this.
                if peer_id in self.peer_topics.get(self._topic, ()):
                    await self.mesh_router.send_recent_messages(peer_id, self._topic)
        finally:
            if not lock.locked():
                self._meeting.pop(peer_id, None)

    async def _handle_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC) -> None:
        for subscription in rpc.subscriptions[:MAX_SUBSCRIPTIONS]:
            self.handle_subscription(peer_id, subscription)
        for message in rpc.publish:
            await self.push_msg(peer_id, message)
            await trio.lowlevel.checkpoint()  # others have their turn during a flood
        if rpc.HasField("control"):
            control = tame(rpc.control, self._topic)
            await self.router.handle_rpc(rpc_pb2.RPC(control=control), peer_id)

    async def publish(
        self, topic_id: str | list[str], data: bytes, passing: Passing = "push"
    ) -> None:
        """Sign a message of ours and send it, or offer it. Returns when it is queued."""
        assert self.sign_key is not None
        topics = [topic_id] if isinstance(topic_id, str) else topic_id
        msg = rpc_pb2.Message(
            data=data, topicIDs=topics, from_id=self.my_id.to_bytes(), seqno=self._next_seqno()
        )
        msg.signature = self.sign_key.sign(PUBSUB_SIGNING_PREFIX.encode() + msg.SerializeToString())
        self.seen_messages.add(id_of(msg))
        subscribed = self.peer_topics.get(self._topic, set())
        self._pass_on(msg, subscribed, passing)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Check a message of another's, offer it to ``accept``, and pass it on."""
        message_id = id_of(msg)
        if self.seen_messages.has(message_id):
            self.mesh_router.offers.arrived(message_id, msg_forwarder, trio.current_time())
            return
        if reason := self._flaw(msg_forwarder, msg):
            self.refused[reason] += 1
            return
        # Marked once the signature holds, and whatever becomes of it: before, anybody could
        # silence a message by sending a false one with its id.
        self.seen_messages.add(message_id)
        self.mesh_router.offers.arrived(message_id, msg_forwarder, trio.current_time())
        origin = ID(msg.from_id)
        if passing := self._accept(msg.data, origin.to_base58()):
            mesh = self.mesh_router.mesh.get(self._topic, set())
            self._pass_on(msg, mesh - {origin}, passing)

    def _pass_on(self, msg: rpc_pb2.Message, peers: set[ID], passing: Passing) -> None:
        here = sorted(peers.intersection(self.peer_queues), key=ID.to_bytes)
        self.mesh_router.pass_on(msg, here, push=passing == "push")

    def _flaw(self, forwarder: ID, msg: rpc_pb2.Message) -> str:
        """Why the message is refused, or ""; the cheap checks come first."""
        if list(msg.topicIDs) != [self._topic]:
            return "topic"
        if len(msg.data) > self._max_data_bytes:
            return "size"
        if len(msg.from_id) != _ED25519_ID_BYTES or len(msg.seqno) != 8:
            return "publisher"
        if msg.from_id == self.my_id.to_bytes():
            return "echo"
        if not self._messages.spend(forwarder):
            return "rate"
        if len(msg.signature) != _SIGNATURE_BYTES or not self._signed(msg):
            return "signature"
        return ""

    def _signed(self, msg: rpc_pb2.Message) -> bool:
        try:
            return signature_validator(msg)
        except Exception:  # noqa: BLE001 - it raises on malformed keys, whatever its decoder raises
            return False

    def get_hello_packet(self) -> rpc_pb2.RPC:
        """What we say first on a stream: our subscription."""
        hello = super().get_hello_packet()
        hello.ClearField("senderRecord")
        return hello

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        """Send one RPC, without our address record; False when the stream has ended."""
        rpc_msg.ClearField("senderRecord")
        return await super().write_msg(stream, rpc_msg)

    async def handle_sending_messages(
        self, peer_id: ID, stream: INetStream, queue: RpcQueue
    ) -> None:
        """Write what is queued for one peer until its queue is closed or its stream breaks."""
        try:
            while (rpc := await queue.pop()) is not None:
                self._writing.add(peer_id)
                if not await self.write_msg(stream, rpc):
                    return
                self._writing.discard(peer_id)
        except BaseLibp2pError:
            self._handle_dead_peer(peer_id)
        finally:
            self._writing.discard(peer_id)


def tame(control: rpc_pb2.ControlMessage, topic: str) -> rpc_pb2.ControlMessage:
    """What of ``control`` is about ``topic``, each thing once, ids capped, no peers to dial."""
    tamed = rpc_pb2.ControlMessage()
    if any(graft.topicID == topic for graft in control.graft):
        tamed.graft.add(topicID=topic)
    back_offs = [prune.backoff for prune in control.prune if prune.topicID == topic]
    if back_offs:
        tamed.prune.add(topicID=topic, backoff=min(*back_offs, MAX_BACK_OFF_S))
    offered = _ids(ihave.messageIDs for ihave in control.ihave if ihave.topicID == topic)
    if offered:
        tamed.ihave.add(topicID=topic, messageIDs=offered)
    wanted = _ids(iwant.messageIDs for iwant in control.iwant)
    if wanted:
        tamed.iwant.add(messageIDs=wanted)
    return tamed


def _ids(lists: Iterable[Iterable[bytes]]) -> list[bytes]:
    ids = dict.fromkeys(islice(chain.from_iterable(lists), MAX_IDS))
    return [message_id for message_id in ids if len(message_id) <= MAX_ID_BYTES]
