"""Gossip over real hosts on loopback. Waits are for changes of a view, with a real deadline."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import trio
from libp2p.abc import INetStream
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from petalnode.errors import PeerError
from petalnode.p2p import gossip
from petalnode.p2p.envelope import _DOMAIN, MAX_RECORD_BYTES, seal
from petalnode.p2p.gossip import ABSORBED_AT_ONCE, PUSH_BURST, open_gossip
from petalnode.p2p.hello import HELLO_PROTOCOL, About, ask, hello_handler
from petalnode.p2p.host import open_host
from petalnode.p2p.pubsub_limits import Budgets
from petalnode.routing.announcement import Announcement, InvalidAnnouncement
from petalnode.routing.view import Sighting, SwarmView

from .muxers import DEADLINE_S
from .records import FINGERPRINT, WALL, identity, record
from .swarms import NETWORK, Member, open_line, open_member


def seqs(view: SwarmView) -> dict[str, int]:
    return {a.peer_id: a.seq for a in view.live(trio.current_time())}


async def until(view: SwarmView, happened: Callable[[], bool]) -> None:
    """Wait until a change of ``view`` makes ``happened`` true."""
    changed = trio.Event()
    view.on_change = lambda: changed.set()
    with trio.fail_after(DEADLINE_S):
        while not happened():
            await changed.wait()
            changed = trio.Event()


async def sees(viewer: Member, who: Member, seq: int) -> None:
    await until(viewer.view, lambda: seqs(viewer.view).get(who.who.peer_id) == seq)


async def test_a_record_reaches_everybody_in_a_line_from_the_first_moment() -> None:
    async with open_line(4) as members:
        first = members[0]
        await first.gossip.publish(record(first.who, seq=1))
        for member in members:
            await sees(member, first, 1)
        assert members[3].host._known[first.who.peer_id] == record(first.who).addrs
        last = members[3]
        await last.gossip.publish(record(last.who, seq=7))
        await sees(first, last, 7)
        assert all(not member.gossip.refused for member in members)


async def test_a_record_published_just_before_a_peer_connects_arrives() -> None:
    async with open_member(1) as alone:
        await alone.gossip.publish(record(alone.who, seq=1))
        async with open_member(2, contacts=[alone.host]) as late:
            await sees(late, alone, 1)


async def test_a_peer_that_starts_gossip_long_after_it_connected_is_heard() -> None:
    async with open_member(1) as early, open_host(identity(2), listen=()) as host:
        tried: list[Any] = []
        open_stream = early.host.libp2p.new_stream

        async def new_stream(*args: Any) -> Any:
            tried.append(args)
            return await open_stream(*args)

        early.host.libp2p.new_stream = new_stream
        await host.connect(early.host.addrs[0])
        await host.ping(early.who.peer_id)
        assert not tried  # it would be told that nobody speaks gossip there
        view = SwarmView()
        async with open_gossip(
            host,
            identity(2),
            network=NETWORK,
            fingerprint=FINGERPRINT,
            view=view,
            wall_clock=lambda: WALL,
        ):
            await early.gossip.publish(record(early.who))
            await until(view, lambda: seqs(view) == {early.who.peer_id: 1})


async def test_goodbye_is_heard_though_the_node_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gossip, "FLUSH_DEADLINE_S", DEADLINE_S)
    async with open_member(1) as stays:
        async with open_member(2, contacts=[stays.host]) as leaves:
            await leaves.gossip.publish(record(leaves.who, seq=1))
            await sees(stays, leaves, 1)
            write = leaves.gossip.pubsub.write_msg

            async def write_slowly(stream: INetStream, rpc: rpc_pb2.RPC) -> bool:
                await trio.sleep(0.1)
                return await write(stream, rpc)

            leaves.gossip.pubsub.write_msg = write_slowly
            await leaves.gossip.publish(record(leaves.who, seq=2, state="offline"))
        await until(stays.view, lambda: not seqs(stays.view))


async def test_a_restarted_peer_is_heard_at_once() -> None:
    async with open_member(1) as stays:
        for restart, wall in enumerate([WALL, WALL + 0.5, WALL + 1.0]):
            async with open_member(2, contacts=[stays.host], wall=wall) as again:
                await again.gossip.publish(record(again.who, seq=restart + 1))
                await sees(stays, again, restart + 1)


async def test_clocks_thirty_seconds_apart_work() -> None:
    async with (
        open_member(1, wall=WALL) as early,
        open_member(2, contacts=[early.host], wall=WALL + 30) as late,
    ):
        await early.gossip.publish(record(early.who, issued_at=WALL))
        await late.gossip.publish(record(late.who, issued_at=WALL + 30))
        await sees(late, early, 1)
        await sees(early, late, 1)


async def test_other_models_do_not_mix() -> None:
    async with (
        open_member(1) as ours,
        open_member(2, contacts=[ours.host]) as friend,
        open_member(3, contacts=[ours.host], fingerprint="f" * 32) as other,
    ):
        await other.gossip.publish(record(other.who, fingerprint="f" * 32))
        await ours.gossip.publish(record(ours.who, seq=1))
        await sees(friend, ours, 1)
        assert seqs(other.view) == {other.who.peer_id: 1}
        assert seqs(ours.view) == {ours.who.peer_id: 1}


def with_body(**changes: Any) -> bytes:
    """An envelope by member 1 whose record no honest node would sign."""
    body: bytes = msgpack.packb(record(identity(1)).to_dict() | changes)
    return identity(1).sign(_DOMAIN + body) + body


def by(number: int, **changes: Any) -> bytes:
    return seal(identity(number), record(identity(number), **changes))


BAD_RECORDS = {
    "malformed": b"\xc1" * 100,
    "throughput": with_body(decode_tps=0.0),
    "span": with_body(start=4, end=4),
    "ttl_s": with_body(ttl_s=1e9),
    "signature": b"\x00" * 64 + with_body()[64:],
    "publisher": by(9),
    "fingerprint": by(1, fingerprint="f" * 32),
    "future": by(1, issued_at=WALL + 3600),
    "expired": by(1, issued_at=WALL - 3600),
    "stale": by(1, seq=4),
    "size": b"\xc1" * (MAX_RECORD_BYTES + 1),
}


async def test_bad_records_are_refused_where_they_enter_and_go_no_further() -> None:
    async with open_line(3) as (bad, middle, end):
        await bad.gossip.publish(record(bad.who, seq=5))
        for raw in BAD_RECORDS.values():
            await bad.gossip.pubsub.publish(bad.gossip.topic, raw)
        await bad.gossip.publish(record(bad.who, seq=6))
        await sees(end, bad, 6)
        assert set(middle.gossip.refused) == set(BAD_RECORDS)
        assert not end.gossip.refused
        assert list(seqs(end.view)) == [bad.who.peer_id]


async def test_what_a_snapshot_brought_first_is_still_forwarded() -> None:
    async with open_line(3) as (first, middle, end):
        news = record(first.who, seq=3)
        assert middle.gossip.absorb([Sighting(seal(first.who, news), 1.0)]) == 1
        await first.gossip.publish(news)
        await sees(end, first, 3)
        assert not middle.gossip.refused


async def test_a_snapshot_is_checked_like_gossip() -> None:
    async with open_member(1) as giver, open_member(2) as taker:
        await giver.gossip.publish(record(giver.who))
        (given,) = giver.gossip.snapshot()
        old = Sighting(by(3), 31.0)
        own = Sighting(by(2), 0.0)
        bad = [Sighting(raw, 0.0) for reason, raw in BAD_RECORDS.items() if reason != "publisher"]
        assert taker.gossip.absorb([*bad[:-2], given, old, own, given]) == 1
        assert seqs(taker.view) == {giver.who.peer_id: 1}
        assert taker.gossip.refused["echo"] == 1
        assert taker.gossip.refused["expired"] == 2
        assert taker.gossip.refused["throughput"] == 1
        # Nobody asks for more life than is left.
        assert taker.gossip.snapshot()[0].age_s >= given.age_s


async def test_a_large_snapshot_keeps_nobody_waiting() -> None:
    count = 5 * ABSORBED_AT_ONCE
    sightings = [Sighting(by(number), 0.0) for number in range(3, 3 + count)]
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with open_member(1) as taker, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await trio.lowlevel.checkpoint()
        before = turns
        assert await taker.gossip.absorb_snapshot(sightings) == count
        assert turns - before >= 4
        assert len(taker.gossip.snapshot()) == count
        nursery.cancel_scope.cancel()


async def test_a_joiner_learns_everybody_from_one_hello() -> None:
    async with open_line(2) as (contact, far), open_member(3) as joiner:
        await far.gossip.publish(record(far.who, seq=3))
        await contact.gossip.publish(record(contact.who, seq=5))
        await sees(contact, far, 3)
        about = About(NETWORK, "demo", FINGERPRINT, 8)
        handler = hello_handler(about, contact.gossip.snapshot, contact.gossip.absorb)
        contact.host.serve(HELLO_PROTOCOL, handler)
        peer_id = await joiner.host.connect(contact.host.addrs[0])
        own = seal(joiner.who, record(joiner.who, seq=9))
        answer = await ask(joiner.host, peer_id, network=NETWORK, record=own)
        assert joiner.gossip.absorb(answer.records) == 2
        assert seqs(joiner.view) == {far.who.peer_id: 3, contact.who.peer_id: 5}
        await sees(contact, joiner, 9)


async def test_asking_a_peer_that_speaks_no_hello_is_a_refusal() -> None:
    async with open_member(1) as contact, open_member(2, contacts=[contact.host]) as joiner:
        with pytest.raises(PeerError) as caught:
            await ask(joiner.host, contact.who.peer_id)
        assert caught.value.peer_id == contact.who.peer_id


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: a,
        lambda a: replace(a, seq=a.seq - 1),
        lambda a: record(identity(9), seq=99),
    ],
)
async def test_we_do_not_publish_what_others_would_refuse(
    wrong: Callable[[Announcement], Announcement],
) -> None:
    async with open_member(1) as member:
        first = record(member.who, seq=5)
        await member.gossip.publish(first)
        with pytest.raises(InvalidAnnouncement):
            await member.gossip.publish(wrong(first))


async def test_libp2p_knows_us_by_the_identity_that_signs() -> None:
    async with open_member(1) as member:
        assert member.host.libp2p.get_id() == ID.from_string(member.who.peer_id)


async def test_a_node_whose_clock_was_set_back_speaks_with_later_numbers() -> None:
    async with open_line(2) as (stays, again):
        stays.gossip.absorb([Sighting(by(2, seq=1000), 0.0)])
        hurried: list[bool] = []
        again.gossip.on_accused = lambda: hurried.append(True)
        await again.gossip.publish(record(again.who, seq=7))
        again.gossip.absorb(stays.gossip.snapshot())
        assert hurried == [True]
        again.gossip.absorb(stays.gossip.snapshot())
        assert hurried == [True]  # it knows by now
        said = await again.gossip.publish(record(again.who, seq=8))
        assert said.seq == 1001
        await sees(stays, again, 1001)
        assert (await again.gossip.publish(record(again.who, seq=9))).seq == 1002
        again.gossip.absorb([Sighting(by(2, seq=1002), 0.0)])
        assert len(hurried) == 1  # our own words are no news to us


async def test_a_number_of_ours_that_nobody_signed_for_us_changes_nothing() -> None:
    async with open_member(2) as member:
        forged = bytearray(by(2, seq=1 << 60))
        forged[0] ^= 1
        member.gossip.absorb([Sighting(bytes(forged), 0.0)])
        assert (await member.gossip.publish(record(member.who, seq=1))).seq == 1
        with pytest.raises(InvalidAnnouncement):
            await member.gossip.publish(record(member.who, seq=1))


async def test_beyond_a_few_messages_are_offered_and_arrive_all_the_same() -> None:
    async with open_line(3) as (first, middle, last):
        for member in (first, middle):
            member.gossip._pushes = Budgets(0.0, 0.0)
        pushed: list[str] = []
        for member in (first, middle):
            router = member.gossip.pubsub.mesh_router
            pass_on = router.pass_on

            def noted(*args: Any, push: bool, pass_on: Any = pass_on) -> None:
                pushed.append("push" if push else "offer")
                pass_on(*args, push=push)

            router.pass_on = noted
        for seq in range(1, 4):
            await first.gossip.publish(record(first.who, seq=seq))
            await sees(last, first, seq)
        assert pushed == ["offer"] * 6
        assert all(not member.gossip.refused for member in (first, middle, last))


async def test_a_goodbye_does_not_wait_to_be_asked_for() -> None:
    async with open_member(1) as stays:
        async with open_member(2, contacts=[stays.host]) as leaves:
            await leaves.gossip.publish(record(leaves.who, seq=1))
            await sees(stays, leaves, 1)
            leaves.gossip._pushes = Budgets(0.0, 0.0)
            await leaves.gossip.publish(record(leaves.who, seq=2, state="offline"))
        await until(stays.view, lambda: not seqs(stays.view))


async def test_refreshes_leave_half_of_what_may_be_pushed_to_news() -> None:
    async with open_member(1) as member:
        gossip = member.gossip
        gossip._pushes = Budgets(0.0, PUSH_BURST)
        who = identity(9)

        def hears(seq: int, **changes: Any) -> str:
            return gossip._accept(seal(who, record(who, seq=seq, **changes)), who.peer_id)

        gossip._speakers = Budgets(1e9, 1e9)
        assert hears(1) == "push"  # it is new
        refreshes = [hears(seq) for seq in range(2, 50)]
        assert refreshes.count("push") == PUSH_BURST / 2 - 1
        assert refreshes[-1] == "offer"
        assert hears(50, state="draining") == "push"
        assert hears(51, state="draining") == "offer"
        assert hears(52, start=1) == "push"
        assert hears(53, start=1, moving_to=(0, 2)) == "push"
        gossip.suspicions.probe_failed(who.peer_id, WALL, trio.current_time())
        gossip.suspicions.probe_succeeded(who.peer_id, trio.current_time())
        assert hears(54, start=1, moving_to=(0, 2)) == "push"  # a refutation
        assert hears(55, start=1, moving_to=(0, 2)) == "offer"
        assert hears(56, state="offline") == "push"
        assert hears(53) == ""
