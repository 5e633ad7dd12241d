"""Hidden states through a part of the model, by itself and when hops die."""

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.protocol import Segment
from petalnode.session.hidden import HiddenSession, check_span

from .memory_swarm import open_memory_swarm
from .test_recovery import SPANS, SPARES, Finder

MIDDLE = SPANS[1:3]


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


def states(n, seed=0):
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))


def hidden_session(chain):
    return HiddenSession(chain, torch.float32, 2048)


async def at_once(swarm, hidden):
    """Through the same blocks on one node, in one step."""
    swarm.add("whole", 1, 3)
    async with swarm.chain(("whole", 1, 3)) as chain:
        return await hidden_session(chain).forward(hidden)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


async def test_in_pieces_and_back_to_any_position(checkpoint):
    hidden, other = states(300), states(20, seed=1)
    async with open_memory_swarm(checkpoint, SPANS) as swarm:
        whole = await at_once(swarm, hidden)
        changed = await at_once(swarm, torch.cat([hidden[:37], other]))
        async with swarm.chain(*MIDDLE) as chain:
            session = hidden_session(chain)
            pieces = [await session.forward(part) for part in hidden.split(130)]
            close(torch.cat(pieces), whole)
            close(await session.forward(other, 37), changed[37:])
            assert session.length == 57
            session.rollback(12)
            close(await session.forward(hidden[12:20]), whole[12:20])


@pytest.mark.parametrize("peers", ["b", "c", "bc"])
async def test_hops_die_and_the_outputs_are_the_same(checkpoint, peers):
    hidden = states(60)
    async with open_memory_swarm(checkpoint, [*SPANS, *SPARES]) as swarm:
        whole = await at_once(swarm, hidden)
        del swarm.servers["whole"]
        finder = Finder(swarm)
        async with swarm.chain(*MIDDLE, replacements=finder) as chain:
            session = hidden_session(chain)
            outputs = [await session.forward(hidden[:40])]
            hidden[:40] = 0  # the caller's own; what was fed is remembered
            for peer in peers:
                swarm.kill(peer)
            outputs += [await session.forward(part) for part in hidden[40:].split(1)]
    close(torch.cat(outputs), whole)
    assert {error.peer_id for error in finder.blamed} == set(peers)


async def test_what_does_not_fit_is_said_and_changes_nothing(checkpoint):
    async with open_memory_swarm(checkpoint, SPANS) as swarm, swarm.chain(*MIDDLE) as chain:
        session = hidden_session(chain)
        await session.forward(states(4))
        for wrong in (states(4)[:, :5], states(0), states(4)[0], states(4).long(), states(2048)):
            with pytest.raises(UsageError):
                await session.forward(wrong)
        for position in (-1, 5):
            with pytest.raises(UsageError):
                await session.forward(states(1), position)
            with pytest.raises(UsageError):
                session.rollback(position)
        assert session.length == 4


WRONG_STEPS = {
    "another width": ([Segment(0, 4, 2, 2)], states(2)[:, :5]),
    "a vector": ([Segment(0, 4, 1, 1)], states(1)[0]),
    "integers": ([Segment(0, 4, 2, 2)], states(2).long()),
    "float64": ([Segment(0, 4, 2, 2)], states(2).double()),
    "fewer than it says": ([Segment(0, 4, 2, 2)], states(1)),
    "more than it says": ([Segment(0, 4, 2, 2)], states(3)),
    "nothing": ([], states(0)),
    "no row of the session's": ([Segment(2, 0, 2, 2)], states(2)),
    "a row twice": ([Segment(0, 4, 1, 1), Segment(0, 4, 1, 1)], states(2)),
    "more wanted than fed": ([Segment(0, 4, 2, 3)], states(2)),
    "behind a gap": ([Segment(0, 5, 1, 1)], states(1)),
    "before the start": ([Segment(0, -1, 1, 1)], states(1)),
    "no tokens": ([Segment(0, 4, 0, 0)], states(0)),
    "too short an order": ([Segment(0, 4, 1, 1)], states(1), (0,)),
    "an order of strangers": ([Segment(0, 4, 1, 1)], states(1), (0, 2)),
    "behind a gap after an order": ([Segment(0, 4, 1, 1)], states(1), (1, 1)),
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
async def test_a_step_that_no_hop_takes_is_never_sent(checkpoint, wrong):
    """Else each hop in turn would be lost to it, and its replacements."""
    hidden = states(6)
    async with open_memory_swarm(checkpoint, SPANS) as swarm:
        whole = await at_once(swarm, hidden)
        async with swarm.chain(*MIDDLE, rows=2) as chain:
            await chain.forward([Segment(0, 0, 4, 4)], hidden[:4])
            with pytest.raises(UsageError):
                await chain.forward(*WRONG_STEPS[wrong])
            close(await chain.forward([Segment(0, 4, 2, 2)], hidden[4:]), whole[4:])


def test_spans_that_are_none():
    check_span(0, 4, 4)
    for start, end in ((-1, 2), (2, 2), (3, 2), (0, 5)):
        with pytest.raises(UsageError, match="0:4"):
            check_span(start, end, 4)
