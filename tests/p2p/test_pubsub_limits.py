"""What gossip remembers: bounded, by trio's clock, and the same for the same seed."""

from random import Random

import trio
from libp2p.peer.id import ID

from petalnode.p2p.mesh import BACK_OFF_S, Router
from petalnode.p2p.pubsub_limits import SEEN_FOR_S, Budgets, SeenMessages

from .records import identity

PEERS = [ID.from_string(identity(number).peer_id) for number in range(1, 9)]


async def test_a_message_is_remembered_for_its_time(autojump_clock):
    seen = SeenMessages()
    assert seen.add(b"one")
    assert not seen.add(b"one")
    await trio.sleep(SEEN_FOR_S - 1)
    assert seen.has(b"one")
    await trio.sleep(SEEN_FOR_S - 1)
    assert seen.has(b"one")  # it was met again meanwhile
    await trio.sleep(SEEN_FOR_S)
    assert not seen.has(b"one")
    assert seen.add(b"one")


async def test_what_is_over_takes_no_room(autojump_clock):
    seen = SeenMessages(limit=3)
    for message_id in (b"1", b"2", b"3", b"4"):
        seen.add(message_id)
    assert [seen.has(message_id) for message_id in (b"1", b"2", b"3", b"4")] == [0, 1, 1, 1]
    assert len(seen) == 3
    await trio.sleep(SEEN_FOR_S)
    seen.add(b"5")
    assert len(seen) == 1


async def test_a_budget_fills_with_time_and_up_to_its_burst(autojump_clock):
    budgets = Budgets(per_s=2.0, burst=3.0)
    assert [budgets.spend(PEERS[0]) for _ in range(4)] == [True, True, True, False]
    assert budgets.spend(PEERS[1])
    await trio.sleep(0.5)
    assert [budgets.spend(PEERS[0]) for _ in range(2)] == [True, False]
    await trio.sleep(1000)
    assert [budgets.spend(PEERS[0]) for _ in range(4)] == [True, True, True, False]
    budgets.keep_only({PEERS[1]})
    assert budgets.spend(PEERS[0])  # it starts anew


async def test_the_seed_chooses_peers_whatever_order_a_set_has(autojump_clock):
    orders = (PEERS, PEERS[::-1], PEERS[3:] + PEERS[:3])
    chosen = [Router(Random(7)).select_from_minus(3, order, PEERS[:2]) for order in orders]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 3
    assert not set(chosen[0]) & set(PEERS[:2])
    assert Router(Random(8)).select_from_minus(3, PEERS, PEERS[:2]) != chosen[0]
    assert len(Router(Random(7)).select_from_minus(20, PEERS, ())) == len(PEERS)
    assert Router(Random(7)).select_from_minus(-1, PEERS, ()) == []


async def test_a_back_off_ends_by_trios_clock(autojump_clock):
    router = Router(Random(1))
    router._add_back_off(PEERS[0], "topic", False)
    await trio.sleep(BACK_OFF_S - 0.5)
    assert router._check_back_off(PEERS[0], "topic")
    await trio.sleep(1.0)
    assert not router._check_back_off(PEERS[0], "topic")
    router._add_back_off(PEERS[1], "topic", False, 600)
    router.keep_only(set())
    assert not router._check_back_off(PEERS[1], "topic")
