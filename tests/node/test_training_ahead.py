"""Activations that a hop computes before their gradient is there: whose, how many, and what ends
them."""

import pytest
import torch
import trio
import trio.testing

from petalnode.compute import Load
from petalnode.serving.kept import KeptPasses
from petalnode.training.protocol import Job

from .test_training_server import ALONE, forward, opened
from .training_swarm import HIDDEN, numbers, open_training_swarm, tuning

LENGTHS = [40, 90, 7, 128, 61]
TOKENS = sum(LENGTHS)
TWO = [("a", 0, 2), ("b", 2, 4)]


class Owner:
    """A session, each of a peer of its own."""

    def __init__(self, client):
        self.client = client


class Pass:
    """A forward pass of so many blocks, whose activations take 10 bytes each."""

    def __init__(self, blocks=2):
        self.blocks, self.restored, self.size = blocks, 0, 10

    @property
    def next_activations(self):
        return self.size if self.restored < self.blocks else 0

    def restore(self):
        self.restored += 1

    def let_go(self):
        self.restored -= 1
        return self.size


def put(kept, owner, number, blocks=2):
    one = Pass(blocks)
    kept.put(owner, Job("forward", number, 0, 4, (3,), 0, keep=True), one, 1)
    return one


def take(kept, owner, number):
    return kept.take(owner, Job("backward", 99, 0, 4, (3,), 0, of=number))


def spare(kept, turns=99):
    """Take up to so many turns of spare work; how many there were."""
    taken = 0
    while taken < turns and (turn := kept.spare_turn()) is not None:
        turn.done(turn.compute())
        taken += 1
    return taken


def test_the_pass_that_is_next_is_ahead():
    """The first of a batch, and then the one after the last that was taken."""
    kept, owner = KeptPasses(100, 100), Owner("one")
    passes = {number: put(kept, owner, number) for number in (3, 4, 5)}
    assert spare(kept) == 2
    assert [one.restored for one in passes.values()] == [2, 0, 0]
    first = take(kept, owner, 3)
    assert spare(kept) == 2
    assert passes[4].restored == 2, "while the first is gone back through"
    kept.give_back(first)
    assert kept.ahead == 20
    kept.give_back(take(kept, owner, 5))
    assert (passes[5].restored, spare(kept)) == (0, 0)
    kept.give_back(take(kept, owner, 4))
    assert (kept.ahead, kept.used, spare(kept)) == (0, 0, 0)


def test_a_pass_that_is_never_gone_back_through_is_in_nobodys_way():
    kept, owner = KeptPasses(100, 20), Owner("one")
    stale = put(kept, owner, 1)
    assert spare(kept) == 2
    batch = [put(kept, owner, number) for number in (2, 3)]
    kept.give_back(take(kept, owner, 2))
    assert spare(kept) == 2
    assert (stale.restored, batch[1].restored) == (0, 2), "its activations made room"
    assert kept.ahead == 20


def test_who_was_here_last_comes_first_and_none_goes_without():
    """Nobody's next activations go for somebody who would have more then."""
    kept, early, late = KeptPasses(100, 30), Owner("early"), Owner("late")
    old, new = put(kept, early, 1), put(kept, late, 1)
    assert spare(kept, 1) == 1
    assert (old.restored, new.restored) == (0, 1)
    assert spare(kept) == 2
    assert (old.restored, new.restored) == (1, 2)
    put(kept, early, 2)
    put(kept, late, 2)
    assert spare(kept) == 0
    third = put(kept, Owner("third"), 1)
    assert spare(kept) == 1, "from who had most"
    assert (old.restored, new.restored, third.restored) == (1, 1, 1)
    assert (kept.ahead, spare(kept)) == (30, 0), "and nobody takes it back"


def test_what_is_gone_back_through_is_not_let_go():
    kept, owner, other = KeptPasses(100, 20), Owner("one"), Owner("other")
    one = put(kept, owner, 1)
    assert spare(kept) == 2
    taken = take(kept, owner, 1)
    put(kept, other, 1)
    assert (spare(kept), one.restored, kept.ahead) == (0, 2, 20)
    kept.give_back(taken)
    assert (spare(kept), kept.ahead) == (2, 20)


def test_a_turn_says_how_much_work_it_is():
    """For simulated time."""
    kept = KeptPasses()
    put(kept, Owner("one"), 1)
    assert kept.spare_turn().load == Load(1, 3)


def test_tiny_jobs_in_turn_undo_nothing():
    kept, owners = KeptPasses(1000, 40), [Owner("one"), Owner("other")]
    for owner in owners:
        put(kept, owner, 1, blocks=4)
    turns = spare(kept)
    for number in range(2, 50):
        for owner in owners:
            put(kept, owner, number, blocks=1)
            turns += spare(kept)
    assert turns <= 8
    assert kept.ahead == 40


def test_who_took_last_is_served_first():
    kept, first, second = KeptPasses(100, 10), Owner("first"), Owner("second")
    for number in (1, 2):
        passes = [put(kept, owner, number) for owner in (first, second)]
    kept.give_back(take(kept, first, 1))
    assert spare(kept) == 1
    assert [one.restored for one in passes] == [1, 0]


def test_no_more_is_ahead_than_there_is_room_for():
    kept, owner = KeptPasses(100, 35), Owner("one")
    one = put(kept, owner, 1, blocks=9)
    assert spare(kept) == 3
    assert (one.restored, kept.ahead) == (3, 30)
    kept.give_back(take(kept, owner, 1))
    assert kept.ahead == 0
    put(KeptPasses(100, 9), owner, 1)
    assert spare(KeptPasses(100, 9)) == 0


def test_what_cannot_fit_lets_nobody_go():
    kept, small, large = KeptPasses(100, 25), Owner("small"), Owner("large")
    one = put(kept, small, 1)
    put(kept, large, 1, blocks=1).size = 30
    assert spare(kept) == 2
    assert (one.restored, kept.ahead) == (2, 20)


@pytest.mark.parametrize("end", ["forgotten", "pushed out", "made anew"])
def test_what_goes_takes_its_activations_along(end):
    kept, owner = KeptPasses(2, 100), Owner("one")
    put(kept, owner, 1)
    assert spare(kept, 1) == 1
    turn = kept.spare_turn()
    assert kept.ahead == 20
    if end == "forgotten":
        kept.forget(owner)
    elif end == "pushed out":
        for number in (2, 3):
            put(kept, owner, number)
    else:
        again = put(kept, owner, 1)
        turn.failed(MemoryError())
        assert take(kept, owner, 1).forward is again, "another than the one that failed"
    assert kept.ahead == 0


def test_a_pass_whose_activations_failed_is_not_lost():
    """It is not tried again, and not in the way of others."""
    kept, owner, other = KeptPasses(100, 100), Owner("one"), Owner("other")
    one = put(kept, owner, 1)
    assert spare(kept, 1) == 1
    kept.spare_turn().failed(MemoryError())
    assert (one.restored, kept.ahead, spare(kept)) == (1, 10, 0)
    after = put(kept, other, 1)
    assert (spare(kept), after.restored) == (2, 2)
    kept.give_back(take(kept, owner, 1))
    assert kept.ahead == 20


def test_a_turn_that_fails_after_its_pass_was_taken():
    kept, owner = KeptPasses(100, 100), Owner("one")
    one = put(kept, owner, 1)
    assert spare(kept, 1) == 1
    turn = kept.spare_turn()
    taken = take(kept, owner, 1)
    turn.failed(MemoryError())
    assert (one.restored, kept.ahead) == (1, 10), "whoever took it has the other"
    kept.give_back(taken)
    turn.failed(MemoryError())
    assert kept.ahead == 0


def test_a_session_that_ended_leaves_no_trace():
    kept, owner = KeptPasses(100, 100), Owner("one")
    put(kept, owner, 1)
    spare(kept)
    kept.forget(owner)
    assert [*kept._sessions, *kept._ready, *kept._bytes, *kept._ahead] == []


@pytest.fixture(scope="module")
def batch():
    return numbers(TOKENS, HIDDEN), numbers(TOKENS, HIDDEN, seed=2)


async def both_ways(swarm, training, batch):
    """The gradients, and how many steps of training it took to go back."""
    _, record = await training.forward(batch[0], LENGTHS, tuning())
    await trio.testing.wait_all_tasks_blocked()
    before = sum(peer.engine.training_steps for peer in swarm.peers.values())
    result = await training.backward(record, batch[1])
    return result, sum(peer.engine.training_steps for peer in swarm.peers.values()) - before


async def test_a_hop_that_waits_computes_ahead(tiny_checkpoint, batch):
    """Bit for bit what it gives otherwise, in fewer steps; nothing is left in the end."""
    async with open_training_swarm(tiny_checkpoint(), TWO) as swarm, swarm.training() as training:
        kept = [peer.server._kept for peer in swarm.peers.values()]
        sizes = [one.ahead_size for one in kept]
        for one in kept:
            one.ahead_size = 0
        (grad, grads), steps = await both_ways(swarm, training, batch)
        for one, size in zip(kept, sizes, strict=True):
            one.ahead_size = size
        ours, fewer = await both_ways(swarm, training, batch)
        assert torch.equal(ours[0], grad)
        assert all(torch.equal(ours[1][name], grads[name]) for name in grads)
        assert fewer <= steps - 4, "two hops had all of their first pass"
        await trio.testing.wait_all_tasks_blocked()
        assert [one.ahead for one in kept] == [one.used for one in kept] == [0, 0]


async def test_a_client_that_leaves_leaves_nothing_ahead(tiny_checkpoint, batch):
    async with open_training_swarm(tiny_checkpoint(), TWO) as swarm:
        async with swarm.training() as training:
            await training.forward(batch[0], LENGTHS)
            await trio.testing.wait_all_tasks_blocked()
            assert all(peer.server._kept.ahead for peer in swarm.peers.values())
        await trio.testing.wait_all_tasks_blocked()
        assert [peer.server._kept.ahead for peer in swarm.peers.values()] == [0, 0]


async def test_room_that_comes_free_is_used(tiny_checkpoint):
    """Once a pass was gone back through, and once another client left, with nothing else to do."""
    x = numbers(3, HIDDEN)
    async with open_training_swarm(tiny_checkpoint(), ALONE) as swarm:
        kept = swarm.peers["a"].server._kept
        talk, _ = await opened(swarm)
        for number in (1, 2):
            await talk.say({**forward(number), "keep": True}, x=x)
            await talk.hear()
        await trio.testing.wait_all_tasks_blocked()
        kept.ahead_size = whole = kept.ahead
        assert whole > 0
        await talk.say(Job("backward", 3, 0, 4, (3,), 0, of=1).to_wire(), g=x)
        assert (await talk.hear())["type"] == "grads"
        await trio.testing.wait_all_tasks_blocked()
        assert kept.ahead == whole, "of the second pass"
        other, _ = await opened(swarm)
        await other.say({**forward(1), "keep": True}, x=x)
        await other.hear()
        await trio.testing.wait_all_tasks_blocked()
        talk.stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        (last,) = kept._sessions.values()
        assert [one.activations for one in last.passes.values()] == [whole]


async def test_a_node_about_to_leave_keeps_nothing(tiny_checkpoint):
    """It takes no more jobs: nobody could go back."""
    x = numbers(3, HIDDEN)
    async with open_training_swarm(tiny_checkpoint(), ALONE) as swarm:
        server = swarm.peers["a"].server
        talk, _ = await opened(swarm)
        await talk.say({**forward(1), "keep": True}, x=x)
        await talk.hear()
        await trio.testing.wait_all_tasks_blocked()
        assert server._kept.ahead
        await server.drain()
        assert (await talk.hear())["type"] == "draining"
        assert server._kept.used == server._kept.ahead == 0


async def test_a_node_that_is_told_to_leave_in_a_job_does_not_keep_it(tiny_checkpoint):
    async with open_training_swarm(tiny_checkpoint(), ALONE) as swarm:
        server = swarm.peers["a"].server
        talk, _ = await opened(swarm)
        (session,) = server._sessions
        swarm.on_start = lambda *what: setattr(session, "_draining", True)
        await talk.say({**forward(1), "keep": True}, x=numbers(3, HIDDEN))
        assert (await talk.hear())["type"] == "output"
        assert server._kept.used == 0
