"""Links of one session of a hop: made, not made, too many, standing by."""

from types import SimpleNamespace

import pytest
import torch
import trio
import trio.testing

from petalnode.errors import PeerGone
from petalnode.protocol import Replay
from petalnode.serving.hop_session import LINK_DEADLINE_S, MAX_LINKS_AT_ONCE, MAX_SPARES

from .lone_hop import WIDTH, a_hop, is_reset, stall, step


async def test_a_link_pushes_on_what_comes():
    async with a_hop() as hop:
        feed = await hop.feed()
        await feed.send(*step(0, 3))
        await hop.heard()
        linked = await hop.ask(**hop.link(7, replay=Replay((1,), (3,))))
        assert linked == {
            "type": "linked", "session": bytes([7] * 16), "logged": [3], "complete": True,
        }  # fmt: skip
        assert hop.dialled == [("next", ("/a",), "/petalnode/hop/1")]
        (stream,) = hop.received["next"]
        assert stream.first == {"type": "feed", "session": bytes([7] * 16)}
        replayed = await stream.receive()
        assert (replayed.header["type"], replayed.header["seq"]) == ("step", 0)
        torch.testing.assert_close(replayed.tensors[0], step(0, 3)[1][0][1:] + 1)
        await feed.send(*step(3, 1, seq=2, want=1))
        pushed = await stream.receive()
        assert (pushed.header["seq"], pushed.tensors[0].shape) == (2, (1, WIDTH))
        assert await hop.quiet()
        stream.reset()
        await feed.send(*step(4, 1, seq=3))
        lost = await hop.heard()
        assert (lost["code"], lost["session"]) == ("next", bytes([7] * 16))


async def test_a_link_ends_with_the_session():
    async with a_hop() as hop:
        await hop.ask(**hop.link(7))
        hop.client.reset()
        await hop.ended.wait()
        assert is_reset(hop.received["next"][0])


async def test_a_link_through_the_client():
    async with a_hop() as hop:
        feed = await hop.feed()
        linked = await hop.ask(**hop.link(None, peer=None))
        assert (linked["type"], hop.dialled) == ("linked", [])
        await feed.send(*step(0, 3, want=1))
        frame = await hop.client.receive()
        assert frame.header["type"] == "through"
        assert frame.tensors[0].shape == (3, WIDTH)


@pytest.mark.parametrize("answer", ["refused", "ended", "late"])
async def test_a_link_that_cannot_be_made(answer, autojump_clock):
    async with a_hop() as hop:
        peer, started = "next", trio.current_time()
        if answer == "ended":
            peer = "ghost"
        hop.answer = None if answer == "late" else answer
        heard = await hop.ask(**hop.link(3, peer=peer))
        assert (heard["type"], heard["code"]) == ("error", "link")
        assert heard["session"] == bytes([3] * 16)
        why = {
            "refused": "Peer next does not take the feed.",
            "ended": "Peer ghost is not there.",
            "late": "no answer within 4 s",
        }
        assert why[answer] in heard["why"]
        assert trio.current_time() - started == (LINK_DEADLINE_S if answer == "late" else 0)
        for (stream,) in hop.received.values():
            with pytest.raises(PeerGone):
                await stream.receive()
        for _ in range(MAX_LINKS_AT_ONCE):
            assert (await hop.ask(**hop.link(3, peer="ghost")))["code"] == "link"


async def test_a_peer_that_ends_before_it_answers():
    async with a_hop() as hop:
        hop.answer = None
        await hop.client.send(hop.link(3))
        await trio.testing.wait_all_tasks_blocked()
        await hop.received["next"][0].aclose()
        assert "does not take the feed" in (await hop.heard())["why"]


async def test_a_peer_that_answers_with_more_than_a_word():
    """What it announces is not set aside."""
    async with a_hop() as hop:
        hop.answer = None
        await hop.client.send(hop.link(3))
        await trio.testing.wait_all_tasks_blocked()
        await hop.received["next"][0].send({"type": "fed"}, [torch.zeros(1 << 16)])
        heard = await hop.heard()
        assert heard["code"] == "link"
        assert "over the limit of 0" in heard["why"]


async def test_links_at_once_are_few_also_where_all_are_read_in_one_go():
    """A stream whose bytes are there already is read without giving way to other tasks."""
    async with a_hop() as hop:
        hop.dialling = trio.Event()
        control = hop.control
        frames = [SimpleNamespace(header=hop.link(n)) for n in range(MAX_LINKS_AT_ONCE + 1)]

        async def receive():
            return frames.pop(0)

        control.receive = receive
        await hop.client.send({"type": "where"})
        await hop.ended.wait()
        assert str(hop.error) == "too many links at once"
        assert len(hop.dialled) <= MAX_LINKS_AT_ONCE


@pytest.mark.parametrize("peer", ["ghost", None])
async def test_links_whose_answers_are_not_read_are_few(peer):
    async with a_hop() as hop:
        await hop.ask(**hop.link(0, peer=peer))
        stall(hop.client)
        for n in range(MAX_LINKS_AT_ONCE):
            await hop.client.send(hop.link(n, peer=peer))
            await trio.testing.wait_all_tasks_blocked()
        assert not hop.ended.is_set()
        await hop.client.send(hop.link(9, peer=peer))
        await hop.ended.wait()
        assert str(hop.error) == "too many links at once"


async def test_a_spare_is_brought_up_to_date_and_then_taken():
    async with a_hop() as hop:
        feed = await hop.feed()
        await feed.send(*step(0, 2))
        await hop.heard()
        for _ in range(2):  # twice over the same stream
            linked = await hop.ask(**hop.link(5, replay=Replay((0,), (2,)), spare=True))
            assert (linked["type"], linked["logged"]) == ("linked", [2])
        (stream,) = hop.received["next"]
        for _ in range(2):
            assert (await stream.receive()).header["segments"] == [[0, 0, 2, 0]]
        await feed.send(*step(2, 1, seq=2))
        assert (await hop.heard())["type"] == "out"  # they go where they went
        assert (await hop.ask(**hop.link(5, replay=Replay((3,), (3,)))))["type"] == "linked"
        await feed.send(*step(3, 1, seq=3))
        assert (await stream.receive()).header["seq"] == 3
        assert (len(hop.dialled), hop.session._spares) == (1, {})


async def test_spares_are_few_and_end_with_the_session():
    async with a_hop() as hop:
        for number in range(MAX_SPARES + 1):
            await hop.ask(**hop.link(number, peer=f"p{number}", spare=True))
        await hop.ask(**hop.link(1, peer="p1", spare=True))  # used anew: now p2 is the oldest
        await hop.ask(**hop.link(9, peer="p9", spare=True))
        gone = [name for name, (stream,) in hop.received.items() if is_reset(stream)]
        assert gone == ["p0", "p2"]
        assert len(hop.session._spares) == MAX_SPARES
        hop.client.reset()
        await hop.ended.wait()
        assert all(is_reset(stream) for (stream,) in hop.received.values())


async def test_two_spares_for_one_session_leave_one_stream():
    async with a_hop() as hop:
        hop.dialling = trio.Event()
        for _ in range(2):
            await hop.client.send(hop.link(5, spare=True))
        await trio.testing.wait_all_tasks_blocked()
        hop.dialling.set()
        for _ in range(2):
            await hop.heard()
        assert sorted(map(is_reset, hop.received["next"])) == [False, True]
