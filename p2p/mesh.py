"""py-libp2p's GossipSub router, mended: who is in the mesh, and what goes to whom.

On the wire it is GossipSub 1.1; ids of messages are short (``id_of``), for they are most of what
lazy gossip sends. See ``pubsub`` for the rest, and for why.

- stock offers the ids of the last three seconds, every second, to six peers outside of the mesh,
  and asks everybody who offers. Here an id is offered once to whoever is not known to have it, and
  one peer is asked at a time (``offers``), so a message may as well be only offered, and then costs
  each node one copy instead of one a link.
- our own messages go to every subscriber connected (flood publishing, as go-libp2p does), since
  right after a connection there is no mesh yet.
- stock signs an address record for each RPC that nobody here reads.
- stock measures back-offs and rates by the wall clock, draws peers with the global generator from
  sets. Here trio's clock and an injected generator decide, so that the same seed gives the same
  mesh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from hashlib import sha256
from random import Random

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.mcache import CacheEntry, MessageCache
from libp2p.pubsub.pb import rpc_pb2

from petalnode.p2p.offers import MAX_OFFERED, Offers
from petalnode.p2p.pubsub_limits import Budgets

DEGREE, DEGREE_LOW, DEGREE_HIGH = 4, 3, 8
CHANCE_PEERS = 1  # outside of the mesh, to whom a beat's news are offered as well
HEARTBEAT_S = 1
OFFERED_BEATS = 3  # what is that old is offered to a new neighbour
KEPT_BEATS = 10  # for those who ask
WELCOME_MESSAGES = 4  # that a new neighbour is sent at once, a joiner's own among them
BACK_OFF_S = 5
CONTROL_PER_S = 10.0  # offers, and requests, that one peer may send
ANSWERS_PER_S, ANSWERS_BURST = 100.0, 400.0  # messages that one peer is sent because it asks
ID_BYTES = 12


def id_of(msg: rpc_pb2.Message) -> bytes:
    """What a message is called in offers: the beginning of a hash of its publisher and number."""
    return sha256(msg.from_id + msg.seqno).digest()[:ID_BYTES]


class RecentMessages(MessageCache):
    """libp2p's cache by our ids."""

    def put(self, msg: rpc_pb2.Message) -> None:
        """Keep a message for ``KEPT_BEATS``."""
        message_id = id_of(msg)
        if message_id not in self.msgs:
            self.msgs[message_id] = msg
            self.history[0].append(CacheEntry(message_id, msg.topicIDs))

    def window(self, topic: str) -> list[bytes]:
        """The ids of the last beats, the oldest first: a record must not overtake the next one."""
        beats = reversed(self.history[: self.window_size])
        return [entry.mid for beat in beats for entry in beat if topic in entry.topics]


class Router(GossipSub):
    """GossipSub with petalnode's parameters. ``rng`` chooses peers for the mesh and for gossip."""

    def __init__(self, rng: Random) -> None:
        super().__init__(
            protocols=[PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            prune_back_off=BACK_OFF_S,
            unsubscribe_back_off=BACK_OFF_S,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,  # many nodes behind one address is normal at home
            spam_protection_enabled=False,  # MESSAGES_PER_S stands in for it
        )
        self.scorer = None  # all its weights are zero
        self._rng = rng
        self.mcache = RecentMessages(OFFERED_BEATS, KEPT_BEATS)
        self.offers: Offers[ID] = Offers()
        self.offers_heard = Budgets(CONTROL_PER_S, CONTROL_PER_S)
        self.requests = Budgets(CONTROL_PER_S, CONTROL_PER_S)
        self.answers = Budgets(ANSWERS_PER_S, ANSWERS_BURST)
        self.is_guest: Callable[[ID], bool] = lambda _peer: False
        self._beats = 0

    def pass_on(self, msg: rpc_pb2.Message, peers: Iterable[ID], *, push: bool) -> None:
        """Send a message to those of ``peers`` that lack it, or, without ``push``, offer it.

        Whoever it is not pushed to may hear of it with the next beat.
        """
        self.mcache.put(msg)
        message_id, now = id_of(msg), trio.current_time()
        self.offers.add(message_id, now)
        if push:
            rpc = rpc_pb2.RPC(publish=[msg])
            for peer in self.offers.lacking(message_id, peers, now):
                self.send_rpc(peer, rpc)
                self.offers.arrived(message_id, peer, now)

    def gossip_heartbeat(self) -> defaultdict[ID, dict[str, list[bytes]]]:
        """Offer what is new, once, and ask others for what did not come."""
        assert self.pubsub is not None
        for topic, mesh in self.mesh.items():
            # To others there is no stream yet; they are offered it when there is.
            here = self.pubsub.peer_queues.keys() & self.pubsub.peer_topics.get(topic, set())
            chance = self.select_from_minus(CHANCE_PEERS, here, mesh)
            peers = [*sorted(mesh & here, key=ID.to_bytes), *chance]
            for peer, ids in self.offers.take(peers).items():
                self._offer(peer, topic, ids)
            self._tell_guests(topic, here.difference(peers))
        asking = self.offers.overdue(self.pubsub.seen_messages.has, trio.current_time())
        for peer, ids in asking.items():
            self._ask(peer, ids)
        return defaultdict(dict)  # stock offers every id three times, to others than the mesh

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Send a peer that has just subscribed what was said a moment ago; if much, offer it."""
        assert self.pubsub is not None
        if peer_id not in self.pubsub.peer_queues:
            return  # asked again once there is a stream to it
        offered = self._recent(peer_id, topic)
        if len(offered) > WELCOME_MESSAGES:
            self._offer(peer_id, topic, offered)
        elif offered:
            whole = [msg for each in offered if (msg := self.mcache.get(each))]
            self.send_rpc(peer_id, rpc_pb2.RPC(publish=whole))

    def remove_peer(self, peer_id: ID) -> None:
        """The peer is gone, and what was on the way to it is lost."""
        super().remove_peer(peer_id)
        self.offers.forget(peer_id)

    async def handle_ihave(self, ihave_msg: rpc_pb2.ControlIHave, sender_peer_id: ID) -> None:
        """Ask for what we lack, unless another was asked just now."""
        assert self.pubsub is not None
        if not self.offers_heard.spend(sender_peer_id):
            return
        now, seen = trio.current_time(), self.pubsub.seen_messages
        wanted = []
        for message_id in ihave_msg.messageIDs:
            if seen.has(message_id):
                self.offers.arrived(message_id, sender_peer_id, now)
            elif self.offers.offered(message_id, sender_peer_id, now):
                wanted.append(message_id)
        if wanted:
            self._ask(sender_peer_id, wanted)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        """Send what is asked for, all in one, as far as it is remembered."""
        if not self.requests.spend(sender_peer_id):
            return
        found = [msg for each in iwant_msg.messageIDs if (msg := self.mcache.get(each))]
        found = [msg for msg in found if self.answers.spend(sender_peer_id)]
        if found:
            self.send_rpc(sender_peer_id, rpc_pb2.RPC(publish=found))

    async def emit_control_message(self, control_msg: rpc_pb2.ControlMessage, to_peer: ID) -> None:
        """Queue it without our address record, which stock would sign anew."""
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    def _tell_guests(self, topic: str, outside: Iterable[ID]) -> None:
        """Offer what is recent to those outside of the mesh whom nobody but us may tell.

        A mesh has few places, and clients, which nobody dials, may be many. Each has its turn
        once in as many beats as messages count as recent.
        """
        self._beats += 1
        for peer in sorted(outside, key=ID.to_bytes):
            its_turn = peer.to_bytes()[-1] % OFFERED_BEATS == self._beats % OFFERED_BEATS
            if its_turn and self.is_guest(peer) and (ids := self._recent(peer, topic)):
                self._offer(peer, topic, ids)

    def _recent(self, peer: ID, topic: str) -> list[bytes]:
        """What was said lately and the peer lacks; from here on it counts as told."""
        now = trio.current_time()
        recent = self.mcache.window(topic)[-MAX_OFFERED:]
        lacking = [each for each in recent if self.offers.lacking(each, [peer], now)]
        for message_id in lacking:
            self.offers.arrived(message_id, peer, now)
        return lacking

    def _offer(self, peer: ID, topic: str, ids: list[bytes]) -> None:
        ihave = rpc_pb2.ControlIHave(topicID=topic, messageIDs=ids)
        self.send_rpc(peer, rpc_pb2.RPC(control=rpc_pb2.ControlMessage(ihave=[ihave])))

    def _ask(self, peer: ID, ids: list[bytes]) -> None:
        iwant = rpc_pb2.ControlIWant(messageIDs=ids)
        self.send_rpc(peer, rpc_pb2.RPC(control=rpc_pb2.ControlMessage(iwant=[iwant])))

    def select_from_minus(  # type: ignore[override]  # stock's is static and draws by itself
        self, num_to_select: int, pool: Iterable[ID], minus: Iterable[ID]
    ) -> list[ID]:
        """At most so many peers of ``pool`` that are not in ``minus``, drawn with our generator."""
        candidates = sorted(set(pool).difference(minus), key=ID.to_bytes)
        return self._rng.sample(candidates, max(0, min(num_to_select, len(candidates))))

    def _add_back_off(
        self, peer: ID, topic: str, is_unsubscribe: bool, backoff_duration: int = 0
    ) -> None:
        until = int(trio.current_time()) + (backoff_duration or BACK_OFF_S)
        known = self.back_off.setdefault(topic, {})
        known[peer] = max(known.get(peer, 0), until)

    def _check_back_off(self, peer: ID, topic: str) -> bool:
        known = self.back_off.get(topic, {})
        if known.get(peer, 0) > int(trio.current_time()):
            return True
        known.pop(peer, None)
        return False

    def _check_graft_flood_protection(self, peer_id: ID, topic: str) -> bool:
        return True  # the back-off that the same PRUNE began says the same

    def keep_only(self, peers: Container[ID]) -> None:
        """Forget what is remembered of everybody else."""
        self.offers_heard.keep_only(peers)
        self.requests.keep_only(peers)
        self.answers.keep_only(peers)
        for topic, known in self.back_off.items():
            self.back_off[topic] = {peer: until for peer, until in known.items() if peer in peers}
