"""The router by itself: to whom it offers, whom it asks, what it answers. No network."""

from random import Random
from types import SimpleNamespace
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from petalnode.p2p.mesh import (
    ANSWERS_BURST,
    ANSWERS_PER_S,
    CONTROL_PER_S,
    ID_BYTES,
    KEPT_BEATS,
    OFFERED_BEATS,
    WELCOME_MESSAGES,
    Router,
    id_of,
)
from petalnode.p2p.offers import ASK_S
from petalnode.p2p.pubsub_limits import SeenMessages

from .records import identity

TOPIC = "topic"
A, B, C = (ID.from_string(identity(number).peer_id) for number in (1, 2, 3))


class Sent:
    """A router whose mesh is A and B; C is subscribed as well. What it sends is in ``rpcs``."""

    def __init__(self) -> None:
        self.rpcs: list[tuple[ID, rpc_pb2.RPC]] = []
        self.router: Any = Router(Random(1))
        self.router.pubsub = SimpleNamespace(
            peer_topics={TOPIC: {A, B, C}},
            peer_queues=dict.fromkeys((A, B, C)),
            seen_messages=SeenMessages(),
        )
        self.router.mesh = {TOPIC: {A, B}}
        self.router.send_rpc = lambda peer, rpc, priority=False: self.rpcs.append((peer, rpc))

    def take(self) -> list[tuple[ID, list[bytes], list[bytes], int]]:
        """To whom what was offered, asked of, and how many messages sent, since the last look."""
        found = [
            (
                peer,
                [each for part in rpc.control.ihave for each in part.messageIDs],
                [each for part in rpc.control.iwant for each in part.messageIDs],
                len(rpc.publish),
            )
            for peer, rpc in self.rpcs
        ]
        self.rpcs.clear()
        return found


def message(number: int = 1) -> rpc_pb2.Message:
    seqno = number.to_bytes(8, "big")
    return rpc_pb2.Message(data=b"data", topicIDs=[TOPIC], from_id=b"me", seqno=seqno)


def named(number: int = 1) -> bytes:
    return id_of(message(number))


def test_ids_are_short_and_of_publisher_and_number() -> None:
    assert len(named()) == ID_BYTES
    assert named(1) != named(2)
    other = message()
    other.from_id = b"you"
    assert id_of(other) != named()


async def test_what_is_pushed_is_offered_to_one_more() -> None:
    sent = Sent()
    sent.router.pass_on(message(), [A, B], push=True)
    assert sent.take() == [(A, [], [], 1), (B, [], [], 1)]
    sent.router.gossip_heartbeat()
    assert sent.take() == [(C, [named()], [], 0)]
    sent.router.gossip_heartbeat()
    assert sent.take() == []


async def test_what_is_only_offered_is_offered_once_with_the_next_beat() -> None:
    sent = Sent()
    sent.router.offers.arrived(named(), A, trio.current_time())  # it came from there
    sent.router.pass_on(message(), [B], push=False)
    assert sent.take() == []
    sent.router.gossip_heartbeat()
    assert sent.take() == [(B, [named()], [], 0), (C, [named()], [], 0)]


async def test_to_whom_there_is_no_stream_yet_it_is_offered_when_there_is() -> None:
    """Else it would be taken for told, and never hear of it."""
    sent = Sent()
    del sent.router.pubsub.peer_queues[A]
    sent.router.pass_on(message(), [B], push=True)
    sent.router.gossip_heartbeat()
    await sent.router.send_recent_messages(A, TOPIC)
    assert A not in {peer for peer, *_ in sent.take()}
    sent.router.pubsub.peer_queues[A] = None
    await sent.router.send_recent_messages(A, TOPIC)
    assert sent.take() == [(A, [], [], 1)]
    await sent.router.send_recent_messages(A, TOPIC)
    assert sent.take() == []
    sent.router.remove_peer(A)  # and what was on the way is lost
    await sent.router.send_recent_messages(A, TOPIC)
    assert sent.take() == [(A, [], [], 1)]


async def test_a_new_neighbour_is_sent_a_little_and_offered_more() -> None:
    sent = Sent()
    numbers = range(1, WELCOME_MESSAGES + 2)
    for number in numbers:
        sent.router.pass_on(message(number), [], push=False)
        await sent.router.send_recent_messages(B if number == 1 else C, TOPIC)
    assert [(peer, count) for peer, _, _, count in sent.take()][:2] == [(B, 1), (C, 2)]
    await sent.router.send_recent_messages(A, TOPIC)
    assert sent.take() == [(A, [named(number) for number in numbers], [], 0)]


async def test_one_who_offers_is_asked_and_then_the_next(autojump_clock: object) -> None:
    sent = Sent()
    sent.router.pubsub.seen_messages.add(named(2))
    both = rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[named(1), named(2)])
    await sent.router.handle_ihave(both, A)
    assert sent.take() == [(A, [], [named(1)], 0)]
    await sent.router.handle_ihave(both, B)
    assert sent.take() == []
    await trio.sleep(ASK_S)
    sent.router.gossip_heartbeat()
    assert sent.take() == [(B, [], [named(1)], 0)]
    sent.router.pubsub.seen_messages.add(named(1))
    await trio.sleep(ASK_S)
    sent.router.gossip_heartbeat()
    assert sent.take() == []


async def test_who_asks_is_sent_all_in_one_as_far_as_it_is_kept() -> None:
    sent = Sent()
    for number in (1, 2):
        sent.router.pass_on(message(number), [], push=False)
    wanted = rpc_pb2.ControlIWant(messageIDs=[named(1), named(2), named(3)])
    await sent.router.handle_iwant(wanted, C)
    assert sent.take() == [(C, [], [], 2)]
    for _ in range(KEPT_BEATS):
        sent.router.mcache.shift()
    await sent.router.handle_iwant(wanted, C)
    assert sent.take() == []


async def test_guests_outside_of_the_mesh_are_offered_everything_in_their_turn() -> None:
    sent = Sent()
    sent.router.mesh = {TOPIC: {A}}
    sent.router.select_from_minus = lambda *_: []
    sent.router.is_guest = lambda peer: peer == C
    numbers = range(1, 9)
    offered: dict[ID, list[bytes]] = {B: [], C: []}
    for number in numbers:
        sent.router.pass_on(message(number), [], push=False)
        sent.router.gossip_heartbeat()
        sent.router.mcache.shift()
    for _ in range(OFFERED_BEATS):
        sent.router.gossip_heartbeat()
        sent.router.mcache.shift()
    told = sent.take()
    for peer, ids, _, pushed in told:
        assert not pushed
        if peer != A:
            offered[peer] += ids
    assert offered[B] == []
    assert offered[C] == [named(number) for number in numbers]  # in order
    assert sum(peer == C for peer, *_ in told) <= 1 + len(numbers) / OFFERED_BEATS


async def test_who_asks_again_and_again_is_sent_so_much(autojump_clock: object) -> None:
    sent = Sent()
    numbers = range(1, 101)
    for number in numbers:
        sent.router.pass_on(message(number), [], push=False)
    wanted = rpc_pb2.ControlIWant(messageIDs=[named(number) for number in numbers])
    for _ in range(8):
        await sent.router.handle_iwant(wanted, C)
    assert sum(count for *_, count in sent.take()) == ANSWERS_BURST
    await trio.sleep(0.5)
    await sent.router.handle_iwant(wanted, C)
    assert sum(count for *_, count in sent.take()) == ANSWERS_PER_S / 2


async def test_who_offers_or_asks_without_end_is_not_heard(autojump_clock: object) -> None:
    sent = Sent()
    sent.router.pass_on(message(1), [], push=False)
    for number in range(2, 4 * int(CONTROL_PER_S)):
        offer = rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[named(number)])
        await sent.router.handle_ihave(offer, A)
        await sent.router.handle_iwant(rpc_pb2.ControlIWant(messageIDs=[named(1)]), B)
    to = [peer for peer, *_ in sent.take()]
    assert (to.count(A), to.count(B)) == (CONTROL_PER_S, CONTROL_PER_S)
