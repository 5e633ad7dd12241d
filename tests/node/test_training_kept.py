"""What hops keep of a forward pass for the backward that follows: used, forgotten, never needed."""

from dataclasses import replace

import pytest
import torch
import trio
import trio.testing

from petalnode.events import HopLost
from petalnode.serving.kept import KeptPasses
from petalnode.training.protocol import Job

from .test_training_server import ALONE, forward, opened
from .training_swarm import DEADLINE_S, HIDDEN, at_once, numbers, open_training_swarm, tuning

LENGTHS = [40, 90, 7, 128, 61]
TOKENS = sum(LENGTHS)
TWO = [("a", 0, 2), ("b", 2, 4)]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def batch():
    return numbers(TOKENS, HIDDEN), numbers(TOKENS, HIDDEN, seed=2)


def watch(swarm):
    """The jobs that hops computed, in order: peer, kind, whether it went back a kept way."""
    seen = []
    for name, peer in swarm.peers.items():
        train = peer.engine.train

        async def watched(begin, load, name=name, train=train):
            def noted(span):
                steps = begin(span)
                seen.append((name, steps.job.kind, bool(steps.job.of)))
                return steps

            return await train(noted, load)

        peer.engine.train = watched
    return seen


def forget(peer):
    """It keeps nothing any more."""
    kept = peer.server._kept
    for owner in list(kept._sessions):
        kept.forget(owner)


def same(one, other):
    return torch.equal(one[0], other[0]) and all(
        torch.equal(one[1][n], other[1][n]) for n in one[1]
    )


async def test_backward_goes_to_whoever_kept_the_way(checkpoint, batch):
    """It sends the gradient alone; two steps a block, none for the way there."""
    spans = [*TWO, ("a2", 0, 2), ("b2", 2, 4)]
    async with open_training_swarm(checkpoint, spans) as swarm, swarm.training() as training:
        for peer in swarm.peers.values():
            peer.server._kept.ahead_size = 0
        _, record = await training.forward(batch[0], LENGTHS, tuning())
        ways = [[one.held.line.peer_id for one in passed] for passed in record.passed]
        steps = sum(peer.engine.training_steps for peer in swarm.peers.values())
        assert steps == 4 * len(ways)
        seen = watch(swarm)
        await training.backward(record, batch[1])
        steps = sum(peer.engine.training_steps for peer in swarm.peers.values()) - steps
        assert steps == 2 * 4 * len(ways)
        assert all(kind == "backward" and kept for _, kind, kept in seen)
        went = sorted(name for name, _, _ in seen)
        assert went == sorted(name for way in ways for name in way)
        assert len(set(went)) > 2, "forward was spread over replicas"
        assert [peer.server._kept.used for peer in swarm.peers.values()] == [0] * 4


async def test_a_hop_that_forgot_is_sent_the_input(checkpoint, batch):
    """Nobody is blamed, and not a bit of the result differs."""
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training() as training:
        _, record = await training.forward(batch[0], LENGTHS, tuning())
        kept = await training.backward(record, batch[1])
        _, record = await training.forward(batch[0], LENGTHS, tuning())
        forget(swarm.peers["b"])
        seen = watch(swarm)
        assert same(await training.backward(record, batch[1]), kept)
        assert {one for one in seen if one[0] == "b"} == {("b", "backward", False)}
        assert {one for one in seen if one[0] == "a"} == {("a", "backward", True)}
        assert not swarm.failures


async def test_a_record_that_is_used_again(checkpoint, batch):
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training() as training:
        _, record = await training.forward(batch[0], LENGTHS, tuning())
        first = await training.backward(record, batch[1])
        seen = watch(swarm)
        assert same(await training.backward(record, batch[1]), first)
        assert {kept for *_, kept in seen} == {False}, "one use ends what was kept: nobody asks"


async def test_nothing_is_kept_where_nothing_follows(checkpoint, batch):
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training() as training:
        _, record = await training.forward(batch[0], LENGTHS, tuning(), backward=False)
        servers = [peer.server for peer in swarm.peers.values()]
        assert [server._kept.used for server in servers] == [0, 0]
        after_all = await training.backward(record, batch[1])
        expected = at_once(checkpoint, batch[0], LENGTHS, batch[1], tuning())
        torch.testing.assert_close(after_all[0], expected[1], rtol=1e-4, atol=1e-5)


async def test_another_tuning_and_the_end_make_hops_forget(checkpoint, batch):
    async with open_training_swarm(checkpoint, TWO) as swarm:
        servers = [peer.server for peer in swarm.peers.values()]
        async with swarm.training() as training:
            for added in (tuning(), tuning(3)):
                _, record = await training.forward(batch[0], LENGTHS, added)
                used = [server._kept.used for server in servers]
                assert used[0] == used[1] > 2 * TOKENS * HIDDEN * 4
                (session,) = servers[0]._kept._sessions.values()
                assert len(session.passes) == len(record.micros)
        with trio.fail_after(DEADLINE_S):
            for server in servers:
                await server.wait_idle()
        assert [server._kept.used for server in servers] == [0, 0]


@pytest.mark.parametrize("when", ["between the two", "in the midst"])
async def test_a_hop_that_dies(checkpoint, batch, when):
    """Another goes back from the input; the user is told once."""
    said = []
    expected = at_once(checkpoint, batch[0], LENGTHS, batch[1], tuning())
    async with open_training_swarm(checkpoint, TWO) as swarm:

        def die(peer_id, kind, stage):
            if peer_id == "b" and kind == "backward":
                swarm.kill("b")

        async with swarm.training(report=said.append) as training:
            _, record = await training.forward(batch[0], LENGTHS, tuning())
            swarm.add("b2", 2, 4)
            swarm.on_start = die
            if when == "between the two":
                swarm.kill("b")
            grad, _ = await training.backward(record, batch[1])
    torch.testing.assert_close(grad, expected[1], rtol=1e-4, atol=1e-5)
    (lost,) = [event for event in said if isinstance(event, HopLost)]
    assert (lost.peer_id, lost.blocks) == ("b", (2, 4))


async def test_a_hop_that_leaves_in_order_is_not_told_as_lost(checkpoint, batch):
    said = []
    report = said.append
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training(report=report) as one:
        _, record = await one.forward(batch[0], LENGTHS, tuning())
        swarm.add("b2", 2, 4)
        swarm.peers["b"].draining = True
        await swarm.peers["b"].server.drain()
        await one.backward(record, batch[1])
        with trio.fail_after(DEADLINE_S):
            await swarm.peers["b"].server.wait_idle()
    assert said == []


async def test_a_backward_job_that_fits_no_kept_one(checkpoint):
    """Another use, other rows, blocks or numbers: all are forgotten, and the stream goes on."""
    x = numbers(3, HIDDEN)
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        talk, _ = await opened(swarm)
        await talk.say({**forward(1), "keep": True}, x=x)
        assert (await talk.hear())["type"] == "output"
        others = [
            Job("backward", 2, 0, 4, (3,), 0, of=7),
            Job("backward", 3, 0, 4, (2, 1), 0, of=1),
            Job("backward", 4, 0, 3, (3,), 0, of=1),
        ]
        for job in others:
            await talk.say(job.to_wire(), g=x)
            answer = await talk.hear()
            assert (answer["id"], answer["code"]) == (job.id, "forgotten")
        await talk.say(Job("backward", 5, 0, 4, (3,), 0, of=1).to_wire(), g=x)
        answer = await talk.hear()
        assert torch.equal(answer["x"], at_once(checkpoint, x, [3], x)[1])
        await talk.say(Job("backward", 6, 0, 4, (3,), 0, of=1).to_wire(), g=x)
        assert (await talk.hear())["code"] == "forgotten"
        elsewhere, _ = await opened(swarm)
        await talk.say({**forward(7), "keep": True}, x=x)
        assert (await talk.hear())["type"] == "output"
        await elsewhere.say(Job("backward", 1, 0, 4, (3,), 0, of=7).to_wire(), g=x)
        assert (await elsewhere.hear())["code"] == "forgotten", "what others keep is not theirs"


def job(number, lengths=(3,)):
    return Job("forward", number, 0, 4, lengths, 0, keep=True)


def back(of, lengths=(3,)):
    return Job("backward", 99, 0, 4, lengths, 0, of=of)


class Owner:
    """A session, of the peer ``client``."""

    def __init__(self, client):
        self.client = client


def test_who_keeps_most_gives_way():
    kept, few, many, more = KeptPasses(100), Owner("few"), Owner("many"), Owner("many")
    kept.put(few, job(1), "oldest", 20)
    for number in (1, 2, 3, 4):
        kept.put((many, more)[number % 2], job(number), f"many {number}", 25)
    assert kept.used == 95
    assert kept.take(more, back(1)) is None, "the oldest of the peer that keeps most"
    assert kept.take(many, back(2)).forward == "many 2"
    assert kept.take(few, back(1)).forward == "oldest"
    kept.put(more, job(5), "too large", 101)
    assert kept.take(more, back(5)) is None
    kept.put(many, job(4), "once more", 10)
    assert kept.take(many, back(4)).forward == "once more"
    kept.forget(more)
    assert kept.take(more, back(3)) is None


def test_a_newcomer_pushes_nobody_out_who_keeps_less():
    kept, one, other, new = KeptPasses(100), Owner("one"), Owner("other"), Owner("new")
    kept.put(one, job(1), "one", 40)
    kept.put(other, job(1), "other", 30)
    kept.put(new, job(1), "new", 90)
    assert kept.used == 70
    assert kept.take(new, back(1)) is None
    kept.put(new, job(2), "new", 35)
    assert kept.take(one, back(1)) is None, "it had most"
    assert kept.take(other, back(1)).forward == "other"


def test_what_is_gone_back_through_still_counts():
    kept, one, other = KeptPasses(100), Owner("one"), Owner("other")
    kept.put(one, job(1), "one", 60)
    taken = kept.take(one, back(1))
    assert kept.used == 60
    kept.put(other, job(1), "other", 50)
    assert kept.take(other, back(1)) is None, "nobody can let go what is in use"
    kept.give_back(taken)
    assert kept.used == 0
    kept.put(other, job(1), "other", 50)
    assert kept.used == 50


async def test_a_hop_counts_what_waits_to_go_back(checkpoint):
    """Else a client could fill the room again while its backward jobs wait their turn."""
    x = numbers(3, HIDDEN)
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        peer = swarm.peers["a"]
        talk, _ = await opened(swarm)
        await talk.say({**forward(1), "keep": True}, x=x)
        assert (await talk.hear())["type"] == "output"
        used, seen = peer.server._kept.used, []
        assert used > 5 * x.nbytes
        swarm.on_start = lambda *what: seen.append(peer.server._kept.used)
        await talk.say(Job("backward", 2, 0, 4, (3,), 0, of=1).to_wire(), g=x)
        assert (await talk.hear())["type"] == "grads"
        assert seen == [used]
        bad = torch.full((3, HIDDEN), float("nan"))
        for number, of in ((3, 0), (4, 3)):
            kind = "backward" if of else "forward"
            head = Job(kind, number, 0, 4, (3,), 0, keep=not of, of=of).to_wire()
            await talk.say(head, **({"g": bad} if of else {"x": x}))
            await talk.hear()
        await trio.testing.wait_all_tasks_blocked()
        assert peer.server._kept.used == 0, "refused jobs give back what they took"


async def test_one_that_was_forgotten_leaves_the_others(checkpoint, batch):
    """The tuning is not sent again for it: that would make the hop forget all."""
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training() as training:
        _, first = await training.forward(batch[0], LENGTHS, tuning())
        forget(swarm.peers["b"])
        _, second = await training.forward(batch[0], LENGTHS, tuning())
        seen = watch(swarm)
        await training.backward(first, batch[1])
        assert not any(kept for name, _, kept in seen if name == "b")
        seen.clear()
        await training.backward(second, batch[1])
        assert all(kept for *_, kept in seen)


async def test_records_of_two_tunings_in_any_order(checkpoint, batch):
    """Both at once, the later one first, after one backward that was cancelled in the midst."""
    added = [tuning(), tuning(3)]
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training() as training:
        records = [(await training.forward(batch[0], LENGTHS, one))[1] for one in added]
        with trio.CancelScope() as scope:
            swarm.on_start = lambda peer_id, *what: scope.cancel() if peer_id == "a" else None
            await training.backward(records[1], batch[1])
        assert scope.cancelled_caught
        swarm.on_start = lambda *what: None
        results = {}

        async def back(number):
            results[number] = await training.backward(records[number], batch[1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back, 1)
            nursery.start_soon(back, 0)
        assert not swarm.failures
        for number, one in enumerate(added):
            _, grad, grads = at_once(checkpoint, batch[0], LENGTHS, batch[1], one)
            torch.testing.assert_close(results[number][0], grad, rtol=1e-4, atol=1e-5)
            for name, expected in grads.items():
                torch.testing.assert_close(results[number][1][name], expected, rtol=1e-4, atol=1e-4)


async def test_a_lost_hop_is_nobody_to_go_back_to(checkpoint, batch):
    """Though it has come again: what it kept is gone, and a faster one may do as well."""
    async with open_training_swarm(checkpoint, TWO) as swarm, swarm.training() as training:
        _, record = await training.forward(batch[0], LENGTHS, tuning())
        for name, stream in swarm._streams:
            if name == "b":
                stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        swarm.add("b2", 2, 4)
        swarm.speeds = {"b": 1.0, "b2": 1e-9}
        seen = watch(swarm)
        await training.backward(record, batch[1])
        assert "b" not in {name for name, *_ in seen}


def test_a_way_with_another_tuning_is_another_way():
    kept, owner = KeptPasses(100), Owner("one")
    kept.put(owner, job(1), "plain", 10)
    assert kept.take(owner, replace(back(1), version=1)) is None
    assert kept.take(owner, back(1)).forward == "plain"
