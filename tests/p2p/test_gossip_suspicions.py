"""Suspicions on the wire: who is heard, who is asked, what goes no further. Real hosts."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import trio

from petalnode.p2p.envelope import _DOMAIN, seal, unseal, unseal_any
from petalnode.p2p.gossip import PUSH_BURST
from petalnode.p2p.identity import Identity
from petalnode.p2p.pubsub_limits import Budgets
from petalnode.routing import suspicion
from petalnode.routing.announcement import InvalidAnnouncement
from petalnode.routing.suspicion import LIFE_S, Suspicion

from .muxers import DEADLINE_S
from .records import WALL, identity, record
from .swarms import Member, open_line
from .test_gossip import sees

FIRST, LAST = identity(1), identity(3)


@pytest.fixture(autouse=True)
def everybody_has_a_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspicion, "TENURE_S", 0.0)


def accusation(seq: int = 5, **changes: Any) -> Suspicion:
    """Member 1 says that member 3 is dead."""
    return replace(Suspicion(FIRST.peer_id, LAST.peer_id, seq, WALL), **changes)


async def introduce(members: list[Member]) -> None:
    """Everybody knows everybody's record number 5."""
    for member in members:
        await member.gossip.publish(record(member.who, seq=5))
    for viewer in members:
        for member in members:
            await sees(viewer, member, 5)


async def happens(event: trio.Event) -> None:
    with trio.fail_after(DEADLINE_S):
        await event.wait()


async def test_a_suspicion_reaches_those_who_probe_and_the_accused_who_refutes() -> None:
    async with open_line(3) as members:
        first, middle, last = members
        await introduce(members)
        asked: list[str] = []
        refuted = trio.Event()
        middle.gossip.on_suspect = asked.append
        last.gossip.on_accused = refuted.set
        await first.gossip.accuse(accusation())
        await happens(refuted)
        now = trio.current_time()
        assert asked == [LAST.peer_id]
        for member in members:  # nothing but what matters is pushed now, nothing offered
            member.gossip._pushes = Budgets(0.0, PUSH_BURST / 2)
            member.gossip.pubsub.mesh_router.gossip_heartbeat = lambda: defaultdict(dict)
        assert middle.gossip.suspicions.suspected(now) == {LAST.peer_id}
        await last.gossip.publish(record(LAST, seq=6))
        await sees(middle, last, 6)
        await sees(first, last, 6)
        assert not middle.gossip.suspicions.suspected(now)
        assert not middle.gossip.refused


async def test_what_is_known_to_the_dead_mans_friends_still_reaches_the_others() -> None:
    async with open_line(3) as members:
        first, middle, last = members
        await introduce(members)
        accused = identity(4)
        dead = record(accused, seq=5)
        for member in members:
            member.view.apply(dead, trio.current_time(), seal(accused, dead))
        middle.gossip.bury(accused.peer_id)
        asked = trio.Event()
        last.gossip.on_suspect = lambda _peer_id: asked.set()
        await first.gossip.accuse(accusation(accused=accused.peer_id))
        await happens(asked)
        assert middle.gossip.accusers(accused.peer_id) == 1
        assert middle.view.get(accused.peer_id, trio.current_time()) is None


async def test_keys_made_up_are_no_witnesses_against_the_buried_either() -> None:
    async with open_line(1) as (member,):
        gossip, accused = member.gossip, identity(4)
        for who in (FIRST, accused):
            known = record(who, seq=5)
            member.view.apply(known, trio.current_time(), seal(who, known))
        gossip.bury(accused.peer_id)
        for number in range(10, 40):
            who = identity(number)
            said = accusation(accuser=who.peer_id, accused=accused.peer_id)
            assert not gossip._accept(seal(who, said), who.peer_id)
        assert gossip.accusers(accused.peer_id) == 0
        honest = seal(FIRST, accusation(accused=accused.peer_id))
        assert gossip._accept(honest, FIRST.peer_id)
        assert not gossip._accept(honest, FIRST.peer_id)  # said once is enough
        assert gossip.accusers(accused.peer_id) == 1
        assert gossip.refused == {"no voice": 30}


def signed(who: Identity, said: Suspicion) -> bytes:
    """An envelope that no honest node would make: ``who`` need not be the accuser."""
    body: bytes = msgpack.packb(said.to_dict())
    return who.sign(b"petalnode suspicion 1\0" + body) + body


BAD_SUSPICIONS = {
    "signature": signed(identity(9), accusation()),
    "publisher": signed(identity(9), accusation(accuser=identity(9).peer_id)),
    "future": signed(FIRST, accusation(issued_at=WALL + 3600)),
    "expired": signed(FIRST, accusation(issued_at=WALL - LIFE_S - 61)),
    "refuted": signed(FIRST, accusation(seq=4)),
    "stranger": signed(FIRST, accusation(accused=identity(8).peer_id)),
    "malformed": FIRST.sign(b"petalnode suspicion 1\0\x81") + msgpack.packb({"accused": 1}),
}


async def test_bad_suspicions_are_counted_and_go_no_further() -> None:
    async with open_line(3) as members:
        first, middle, last = members
        await introduce(members)
        for raw in BAD_SUSPICIONS.values():
            await first.gossip.pubsub.publish(first.gossip.topic, raw)
        await first.gossip.publish(record(FIRST, seq=6))
        await sees(last, first, 6)
        assert middle.gossip.refused == dict.fromkeys(BAD_SUSPICIONS, 1)
        assert not last.gossip.refused
        assert not middle.gossip.suspicions.suspected(trio.current_time())


async def test_slanderers_lose_their_voice_and_the_slandered_stays() -> None:
    async with open_line(3) as members:
        first, middle, last = members
        await introduce(members)
        asked: list[str] = []
        middle.gossip.on_suspect = asked.append
        for seq in range(5, 9):
            await first.gossip.accuse(accusation(seq=seq))
            await first.gossip.publish(record(FIRST, seq=seq + 1))
            await sees(middle, first, seq + 1)
            await last.gossip.publish(record(LAST, seq=seq + 1))
            await sees(middle, last, seq + 1)
        assert len(asked) == suspicion.MAX_REFUTED
        assert middle.gossip.refused == {"no voice": 1}
        assert middle.gossip.suspicions.dead(trio.current_time() + 1000) == []


def test_a_signature_of_one_kind_does_not_fit_the_other() -> None:
    said = accusation()
    assert unseal_any(seal(FIRST, said)) == said
    body: bytes = msgpack.packb(said.to_dict())
    for raw in (FIRST.sign(_DOMAIN + body) + body, seal(FIRST, said)):
        with pytest.raises(InvalidAnnouncement) as caught:
            unseal(raw)
    assert caught.value.reason == "malformed"
    with pytest.raises(InvalidAnnouncement, match="signature"):
        unseal_any(FIRST.sign(_DOMAIN + body) + body)
