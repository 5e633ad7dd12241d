"""Records that no honest node sends, one by one, and too many that each would do. Real hosts."""

import math
from typing import Any

import msgpack
import pytest
import trio

from petalnode.p2p.envelope import _DOMAIN, MAX_RECORD_BYTES, seal
from petalnode.p2p.gossip import PEER_BURST
from petalnode.routing.announcement import MAX_CLOCK_SKEW_S, MAX_TTL_S
from petalnode.routing.suspicion import Suspicion

from .records import WALL, identity, record
from .swarms import Member, open_line
from .test_gossip import sees, seqs
from .test_gossip_suspicions import happens

ATTACKER = identity(1)


def lie(**changes: Any) -> bytes:
    """Signed by the attacker as it stands, whatever it says."""
    body: bytes = msgpack.packb(record(ATTACKER, seq=7).to_dict() | changes)
    return ATTACKER.sign(_DOMAIN + body) + body


ATTACKS = [
    pytest.param(lie(peer_id=identity(2).peer_id, addrs=[]), "signature", id="forged"),
    pytest.param(seal(identity(9), record(identity(9))), "publisher", id="another's"),
    pytest.param(seal(ATTACKER, record(ATTACKER, seq=4)), "stale", id="replayed"),
    pytest.param(
        lie(issued_at=WALL - MAX_CLOCK_SKEW_S - 31), "expired", id="replayed after its life"
    ),
    pytest.param(lie(name="x" * MAX_RECORD_BYTES), "size", id="oversize"),
    pytest.param(lie(issued_at=WALL + MAX_CLOCK_SKEW_S + 1), "future", id="far future"),
    pytest.param(lie(decode_tps=0.0), "throughput", id="zero throughput"),
    pytest.param(lie(forward_tps=math.nan), "throughput", id="NaN throughput"),
    pytest.param(lie(decode_tps=math.inf), "throughput", id="infinite throughput"),
    pytest.param(lie(decode_tps=-1.0), "throughput", id="negative throughput"),
    pytest.param(lie(bandwidth=math.nan), "bandwidth", id="NaN bandwidth"),
    pytest.param(lie(rtts={"x": 0.0}), "rtts", id="zero round trip"),
    pytest.param(lie(rtts={"x": math.nan}), "rtts", id="NaN round trip"),
    pytest.param(lie(rtts={str(n): 0.1 for n in range(17)}), "rtts", id="too many round trips"),
    pytest.param(lie(ttl_s=2 * MAX_TTL_S), "ttl_s", id="immortal"),
    pytest.param(lie(ttl_s=math.nan), "ttl_s", id="NaN life"),
    pytest.param(lie(seq=(1 << 64) - 1), "seq", id="last sequence number of all"),
    pytest.param(lie(kv_tokens_free=-1), "kv_tokens_free", id="negative room"),
    pytest.param(lie(start=5, end=5), "span", id="empty span"),
    pytest.param(lie(end=9), "span", id="beyond the model"),
    pytest.param(lie(moving_to=[0, 9]), "span", id="moving beyond the model"),
    pytest.param(lie(name="\x1b[2J"), "name", id="terminal codes"),
    pytest.param(lie(addrs=["/ip4/1.2.3.4/tcp/1"]), "addrs", id="an address in another's name"),
    pytest.param(lie(fingerprint="f" * 32), "fingerprint", id="another model"),
]


@pytest.mark.parametrize(("raw", "reason"), ATTACKS)
async def test_it_is_counted_and_neither_believed_nor_passed_on(raw: bytes, reason: str) -> None:
    async with open_line(3) as (bad, middle, end):
        middle.view.num_blocks = end.view.num_blocks = 8
        await bad.gossip.publish(record(bad.who, seq=5))
        await bad.gossip.pubsub.publish(bad.gossip.topic, raw)
        await bad.gossip.publish(record(bad.who, seq=6))
        await sees(end, bad, 6)
        assert middle.gossip.refused == {reason: 1}
        assert not set(end.gossip.refused) - ({"stale"} - {reason})  # it may be overtaken
        assert seqs(middle.view) == seqs(end.view) == {ATTACKER.peer_id: 6}


def arrivals(member: Member, count: int) -> trio.Event:
    """Set once so many messages have been judged there."""
    arrived, judge = trio.Event(), member.gossip.pubsub._accept
    left = count

    def counted(raw: bytes, publisher: str) -> bool:
        nonlocal left
        left -= 1
        verdict = judge(raw, publisher)
        if left == 0:
            arrived.set()
        return verdict

    member.gossip.pubsub._accept = counted
    return arrived


async def test_a_flood_of_keys_does_not_push_us_out_of_our_own_view() -> None:
    """Not even where we came last, after a snapshot."""
    async with open_line(1) as (member,):
        member.view._max_peers = 4
        for number in range(10, 60):
            if number == 13:
                await member.gossip.publish(record(member.who, seq=1))
            who = identity(number)
            member.gossip._accept(seal(who, record(who)), who.peer_id)
        assert len(seqs(member.view)) == 4
        assert member.who.peer_id in seqs(member.view)


async def test_one_peer_floods_and_the_others_are_heard_as_before() -> None:
    flood = 4 * int(PEER_BURST)
    async with open_line(3) as (bad, middle, end):
        arrived = arrivals(middle, flood)
        for seq in range(1, flood + 1):
            await bad.gossip.publish(record(bad.who, seq=seq))
        await middle.gossip.publish(record(middle.who, seq=1))
        await sees(end, middle, 1)
        await sees(bad, middle, 1)
        await happens(arrived)
        passed = seqs(middle.view)[ATTACKER.peer_id]
        assert PEER_BURST <= passed < 2 * PEER_BURST
        assert middle.gossip.refused == {"flood": flood - passed}
        await end.gossip.publish(record(end.who, seq=1))
        await sees(bad, end, 1)
        assert not set(end.gossip.refused) - {"stale"}  # what was offered may be overtaken


async def test_accusations_count_as_messages_too() -> None:
    flood = 2 * int(PEER_BURST)
    async with open_line(2) as (bad, middle):
        arrived = arrivals(middle, flood)
        for number in range(flood):
            accused = identity(number + 3).peer_id
            await bad.gossip.accuse(Suspicion(ATTACKER.peer_id, accused, 1, WALL))
        await happens(arrived)
        assert middle.gossip.refused["stranger"] + middle.gossip.refused["flood"] == flood
        assert middle.gossip.refused["flood"] > PEER_BURST / 2


async def test_nobody_is_silenced_by_old_messages_of_theirs_that_are_sent_again() -> None:
    """Their signatures hold, and after two minutes their ids are forgotten."""
    who = identity(9)
    stale = seal(who, record(who, seq=4))
    expired = seal(who, record(who, seq=3, issued_at=WALL - MAX_CLOCK_SKEW_S - 31))
    async with open_line(1) as (member,):
        gossip = member.gossip
        assert gossip._accept(seal(who, record(who, seq=5)), who.peer_id)
        for _ in range(2 * int(PEER_BURST)):
            assert not gossip._accept(stale, who.peer_id)
            assert not gossip._accept(expired, who.peer_id)
        assert gossip._accept(seal(who, record(who, seq=6)), who.peer_id)
        assert set(gossip.refused) == {"stale", "expired"}
