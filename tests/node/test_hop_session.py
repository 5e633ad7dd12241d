"""One session as a hop serves it: what a client or a sender that does as it likes can cost."""

import pytest
import torch
import trio
import trio.testing

from petalnode.errors import LocalProtocolError, PeerGone
from petalnode.models.kv_cache import MIN_TOKENS
from petalnode.outlet import SEND_DEADLINE_S
from petalnode.protocol import MAX_BLOCKS, BadMessage, Segment, Step
from petalnode.serving.hop_session import MAX_FEEDS, MAX_REACHES_AT_ONCE
from petalnode.serving.rows import Refusal

from .lone_hop import WIDTH, Hop, a_hop, stall, step


async def test_a_step_goes_through_its_blocks_and_what_is_wanted_comes_back(autojump_clock):
    async with a_hop() as hop:
        feed = await hop.feed()
        await trio.sleep(1)
        assert await hop.ask(type="where") == {"type": "at", "seen": 0, "sent": 0, "done": 0}
        hop.engine.held = trio.Event()
        await feed.send(*step(0, 3, seq=5, want=2, took=(7,)))
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.25)
        hop.engine.held.set()
        frame = await hop.client.receive()
        assert hop.engine.asked == [(1, 3, 3)]
        assert (frame.header["type"], frame.header["seq"]) == ("out", 5)
        assert frame.header["took"] == [7, 250_000]
        torch.testing.assert_close(frame.tensors[0], step(0, 3)[1][0][1:] + 1)
        assert hop.budget.used == 2 * MIN_TOKENS
        assert await hop.ask(type="where") == {"type": "at", "seen": 5, "sent": 5, "done": 3}
        await feed.send(*step(3, 1, seq=0, want=1))  # a replay, which nobody awaits
        await feed.send(*step(4, 1, seq=3, want=1))
        assert (await hop.heard())["seq"] == 3
        assert await hop.ask(type="where") == {"type": "at", "seen": 5, "sent": 5, "done": 5}


async def test_of_several_rows_each_gives_its_last(autojump_clock):
    async with a_hop(rows=3) as hop:
        feed = await hop.feed()
        segments = (Segment(1, 0, 2, 1), Segment(0, 0, 1, 0), Segment(2, 0, 3, 2))
        hidden = torch.arange(12.0).reshape(6, WIDTH)
        await feed.send(Step(1, segments).to_wire(), [hidden])
        frame = await hop.client.receive()
        torch.testing.assert_close(frame.tensors[0], hidden[[1, 4, 5]] + 1)
        two = (Segment(1, 2, 1, 1), Segment(0, 1, 2, 1))
        await feed.send(Step(2, two).to_wire(), [hidden[:3]])
        torch.testing.assert_close((await hop.client.receive()).tensors[0], hidden[[0, 2]] + 1)
        await feed.send(Step(3, (Segment(1, 3, 1, 0),)).to_wire(), [hidden[:1]])
        assert (await hop.client.receive()).tensors[0].shape == (0, WIDTH)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ([], "not of shape"),
        ([torch.zeros(2, WIDTH)], "not of shape"),
        ([torch.zeros(1, WIDTH + 1)], "not of shape"),
        ([torch.zeros(1, WIDTH)] * 2, "not of shape"),
        ([torch.zeros(1, WIDTH, dtype=torch.int64)], "not floating point"),
    ],
)
async def test_hidden_states_that_are_none_cost_the_feed(tensors, what):
    async with a_hop() as hop:
        feed, task = hop.open_feed()
        await feed.receive()
        await feed.send(step(0, 1)[0], tensors)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(task.error, BadMessage)
        assert what in str(task.error)
        assert (hop.engine.asked, hop.session._feeds, hop.ended.is_set()) == ([], {}, False)
        await (await hop.feed()).send(*step(0, 1, want=1))
        assert (await hop.heard())["type"] == "out"


async def test_of_what_is_lacking_the_client_hears_once():
    async with a_hop() as hop:
        feed = await hop.feed()
        for position in (3, 4):
            await feed.send(*step(position, 1))
        heard = await hop.heard()
        assert (heard["code"], heard["session"]) == ("gap", b"")
        assert heard["why"] == "row 0 has 0 positions, not 3"
        assert await hop.quiet()
        await feed.send(*step(0, 1))
        assert (await hop.heard())["type"] == "out"
        await feed.send(*step(3, 1))
        assert (await hop.heard())["code"] == "gap"
        feed = await hop.feed()  # another may have had it
        await feed.send(*step(4, 1))
        assert (await hop.heard())["code"] == "gap"
        for _ in range(2):
            await feed.send(*step(0, 101))
            assert (await hop.heard())["code"] == "context"
        await feed.send(*step(5, 1))
        assert (await hop.heard())["code"] == "gap"
        assert await hop.ask(type="where") == {"type": "at", "seen": 1, "sent": 1, "done": 1}


async def test_a_computation_that_fails_is_told_and_sends_nothing():
    async with a_hop() as hop:
        feed = await hop.feed()
        hop.engine.error = LocalProtocolError("The disk burns.", "Run.")
        await feed.send(*step(0, 1, seq=4))
        heard = await hop.heard()
        assert (heard["type"], heard["code"]) == ("error", "internal")
        assert "The disk burns." in heard["why"]
        hop.engine.error = None
        assert await hop.ask(type="where") == {"type": "at", "seen": 4, "sent": 0, "done": 0}
        await feed.send(*step(0, 1, seq=5))
        assert (await hop.heard())["seq"] == 5


async def test_one_step_at_a_time_whatever_the_feeds():
    async with a_hop() as hop:
        first, second = await hop.feed(), await hop.feed()
        hop.engine.held = trio.Event()
        await first.send(*step(0, 1))
        await trio.testing.wait_all_tasks_blocked()
        await second.send(*step(1, 1, seq=2))
        await trio.testing.wait_all_tasks_blocked()
        assert len(hop.engine.asked) == 1
        hop.engine.held.set()
        assert [(await hop.heard())["seq"] for _ in range(2)] == [1, 2]


async def test_feeds_are_few_however_many_are_opened():
    """Also where those before are in the middle of something: each may hold a frame."""
    async with a_hop() as hop:
        hop.engine.held = trio.Event()
        feeds, tasks = [], []
        for _ in range(MAX_FEEDS + 3):
            feed, task = hop.open_feed()
            assert (await feed.receive()).header == {"type": "fed"}
            await feed.send(*step(0, 1))
            await trio.testing.wait_all_tasks_blocked()
            feeds.append(feed)
            tasks.append(task)
        assert [task.ended for task in tasks] == [True] * 3 + [False] * MAX_FEEDS
        assert len(hop.session._feeds) == MAX_FEEDS
        with pytest.raises(PeerGone):
            await feeds[2].receive()
        hop.engine.held.set()
        assert (await hop.heard())["type"] == "out"


async def test_a_feed_that_nobody_reads_counts_too():
    async with a_hop() as hop:
        tasks = []
        for _ in range(MAX_FEEDS + 2):
            stalled, task = hop.open_feed()
            stall(stalled)
            tasks.append(task)
            await trio.testing.wait_all_tasks_blocked()
        assert [task.ended for task in tasks] == [True] * 2 + [False] * MAX_FEEDS


async def test_what_comes_on_a_feed_that_outlives_its_session_is_not_taken():
    """It was still being accepted when the client left; then nobody would give its cache back."""
    async with a_hop() as hop:
        feed, task = hop.open_feed()
        stall(feed)
        await feed.send(*step(0, 1))
        await trio.testing.wait_all_tasks_blocked()
        hop.client.reset()
        await hop.ended.wait()
        feed._raw._in.data.clear()
        feed._raw._in.wake()
        await trio.testing.wait_all_tasks_blocked()
        assert (hop.engine.asked, hop.budget.used, task.ended) == ([], 0, True)


class HandedOver:
    """A lock that is had in the same moment in which the client leaves."""

    def __init__(self, hop):
        self.hop = hop

    async def __aenter__(self):
        self.hop.client.reset()
        with trio.CancelScope(shield=True):
            await self.hop.ended.wait()

    async def __aexit__(self, *_):
        pass


async def test_a_step_whose_turn_comes_as_the_client_leaves_takes_no_cache():
    async with a_hop() as hop:
        feed, task = hop.open_feed()
        await feed.receive()
        hop.session._one_step = HandedOver(hop)
        await feed.send(*step(0, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert (hop.engine.asked, hop.budget.used, task.ended) == ([], 0, True)


async def test_a_client_that_leaves_before_it_hears_that_its_session_is_open():
    async with trio.open_nursery() as nursery:
        hop = Hop(nursery)
        stall(hop.client)
        nursery.start_soon(hop.serve)
        feed, task = hop.open_feed()
        await feed.receive()
        hop.engine.held = trio.Event()
        await feed.send(*step(0, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert hop.budget.used > 0
        hop.client.reset()
        await hop.ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert (hop.budget.used, task.ended) == (0, True)


def test_a_list_of_times_that_is_full_stays_one_that_others_take():
    sent = Step(1, (Segment(0, 0, 1, 0),), took=(1,) * MAX_BLOCKS)
    passed = Step.parse(sent.passed(7).to_wire(), 1)
    assert (len(passed.took), passed.took[-1]) == (MAX_BLOCKS, 7)


async def test_a_client_that_ends_or_breaks_its_control_stream_ends_the_session():
    async with a_hop() as hop:
        feed, task = hop.open_feed()
        await feed.receive()
        hop.engine.held = trio.Event()
        await feed.send(*step(0, 1))
        await trio.testing.wait_all_tasks_blocked()
        await hop.client.aclose()
        await hop.ended.wait()
        assert hop.error is None
        assert hop.session._rows._caches == {}
        with pytest.raises(PeerGone):
            await feed.receive()
        with pytest.raises(PeerGone):
            await hop.client.receive()
        await trio.testing.wait_all_tasks_blocked()
        assert task.ended


async def test_a_client_that_leaves_is_noticed_whatever_waits_unread():
    async with a_hop() as hop:
        hop.tuning.held = trio.Event()
        await hop.client.send({"type": "tuning"})
        await trio.testing.wait_all_tasks_blocked()
        hop.client.reset()
        await hop.ended.wait()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "dance", "lengths": [0]},
        {},
        {"type": "expect"},
        {"type": "reach", "lengths": [0] * 65},
        {"type": "reach", "lengths": [(1 << 24) + 1]},
        {"type": "link"},
    ],
)
async def test_what_breaks_the_protocol_ends_the_session(message):
    async with a_hop() as hop:
        await hop.client.send(message)
        await hop.ended.wait()
        assert isinstance(hop.error, BadMessage)


async def test_an_output_that_the_client_does_not_take_is_given_up(autojump_clock):
    async with a_hop() as hop:
        stall(hop.client)
        await (await hop.feed()).send(*step(0, 1))
        await trio.sleep(SEND_DEADLINE_S + 1)
        hop.client._raw._in.data.clear()
        hop.client._raw._in.wake()
        lost = await hop.heard()
        assert (lost["code"], lost["session"]) == ("next", b"")


async def test_draining_is_told():
    async with a_hop() as hop:
        await hop.session.say_draining()
        assert await hop.heard() == {"type": "draining"}


async def test_what_is_added_is_added_from_the_first_step_on():
    async with a_hop() as hop:
        assert hop.session._rows.tuning == "served"
        for _ in range(2):
            await hop.client.send({"type": "tuning"})
        assert await hop.heard() == {"type": "tuned"}
        assert await hop.quiet()
        assert hop.session._rows.tuning == "what came"
        await (await hop.feed()).send(*step(0, 1))
        await hop.heard()
        await hop.client.send({"type": "tuning"})
        await hop.ended.wait()
        assert str(hop.error) == "an adapter after the first step"


async def test_what_is_not_added_is_told():
    async with a_hop() as hop:
        hop.tuning.refusal = Refusal("busy", "no room")
        heard = await hop.ask(type="tuning")
        assert (heard["code"], heard["why"]) == ("busy", "no room")
        assert not hop.ended.is_set()


async def test_who_is_expected_feeds_and_nobody_else():
    async with a_hop(sender="old") as hop:
        assert hop.session.senders == ("old",)
        old, late = await hop.feed("old"), await hop.feed("new")
        stalled, task = hop.open_feed("old")
        stall(stalled)
        assert await hop.ask(type="expect", peer="new", also=True) == {"type": "expecting"}
        assert hop.session.senders == ("old", "new")
        await hop.ask(type="expect", peer="third", also=True)
        assert hop.session.senders == ("old", "third")
        assert len(hop.session._feeds) == 3
        assert await hop.ask(type="expect", peer="new", also="yes") == {"type": "expecting"}
        assert hop.session.senders == ("new",)
        await trio.testing.wait_all_tasks_blocked()
        assert task.ended
        with pytest.raises(PeerGone):
            await old.receive()
        await late.send(*step(0, 1))
        assert (await hop.heard())["type"] == "out"


async def test_a_step_of_the_one_who_is_no_longer_expected_is_void():
    async with a_hop(sender="old") as hop:
        old, task = hop.open_feed("old")
        await old.receive()
        hop.engine.held = trio.Event()
        await old.send(*step(0, 1))
        await trio.testing.wait_all_tasks_blocked()
        await hop.ask(type="expect", peer="new")
        hop.engine.held.set()
        assert await hop.quiet()
        assert (task.ended, hop.engine.tokens) == (True, 0)


async def test_a_client_without_a_name_for_the_sender_is_the_sender():
    async with a_hop() as hop:
        assert hop.session.senders == ("client",)
        assert hop.session.client == "client"


async def test_lengths_are_told_when_they_are_reached():
    async with a_hop() as hop:
        feed = await hop.feed()
        await hop.client.send({"type": "reach", "lengths": [2]})
        await feed.send(*step(0, 1, seq=0))
        assert await hop.quiet()
        await feed.send(*step(1, 1, seq=0))
        assert await hop.heard() == {"type": "reached"}
        for _ in range(2 * MAX_REACHES_AT_ONCE):  # one after the other, as often as one likes
            assert await hop.ask(type="reach", lengths=[2]) == {"type": "reached"}


@pytest.mark.parametrize("lengths", [[9], [0]])
async def test_questions_that_wait_are_few(lengths):
    """For a step that never comes, or for somebody to read the answer."""
    async with a_hop() as hop:
        assert await hop.ask(type="reach", lengths=[0]) == {"type": "reached"}
        stall(hop.client)
        for _ in range(MAX_REACHES_AT_ONCE):
            await hop.client.send({"type": "reach", "lengths": lengths})
        await trio.testing.wait_all_tasks_blocked()
        assert not hop.ended.is_set()
        await hop.client.send({"type": "reach", "lengths": lengths})
        await hop.ended.wait()
        assert str(hop.error) == "too many questions at once"
