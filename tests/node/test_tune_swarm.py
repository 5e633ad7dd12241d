"""Training through other machines: the losses are those of a run with all blocks here."""

import pytest

from petalnode.events import Waiting
from petalnode.training.tuner import METHODS

from .local_training import LocalTraining
from .training_swarm import FOUR, open_training_swarm
from .tuning_jobs import job_of, run

STEPS = 20


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def local(checkpoint):
    return LocalTraining(checkpoint)


@pytest.mark.parametrize("method", METHODS)
async def test_twenty_steps_have_the_losses_of_a_local_run(local, checkpoint, method):
    """Also with a hop killed in a forward and another in a backward."""
    job = job_of(local, method=method, steps=STEPS, evaluation=None)
    alone = await run(job, local)
    spans = [*FOUR, ("b2", 1, 2), ("c2", 2, 4)]
    killed = []
    async with open_training_swarm(checkpoint, spans) as swarm, swarm.training() as training:
        jobs = 0

        def kill_two(peer_id, kind, stage):
            nonlocal jobs
            jobs += 1
            due = {"forward": 30, "backward": 70}[kind]
            if jobs > due and kind not in killed and len(swarm.peers) > 4:
                killed.append(kind)
                swarm.kill(peer_id)
                if peer_id in "ad":  # nobody else has its block
                    swarm.add(peer_id + "2", *stage)

        swarm.on_start = kill_two
        through = await run(job, training)
    assert sorted(killed) == ["backward", "forward"]
    assert len(alone.losses) == STEPS
    assert through.losses == pytest.approx(alone.losses, rel=1e-4)
    assert alone.losses[0] != alone.losses[-1]


async def test_a_run_resumed_over_the_same_route_has_the_same_losses(local, checkpoint, tmp_path):
    async def through_swarm(job):
        async with open_training_swarm(checkpoint, FOUR) as swarm, swarm.training() as training:
            return await run(job, training)

    whole = await through_swarm(job_of(local, tmp_path / "whole"))
    first = job_of(local, tmp_path / "cut")
    async with open_training_swarm(checkpoint, FOUR) as swarm, swarm.training() as training:
        real, calls = training.backward, []

        async def backward(record, grad):
            calls.append(grad)
            if len(calls) == 4:
                raise RuntimeError("as a SIGKILL")
            return await real(record, grad)

        training.backward = backward
        with pytest.raises(RuntimeError):
            await run(first, training)
    rest = await through_swarm(job_of(local, tmp_path / "cut").resumed())
    assert rest.losses == whole.losses[2:]
    assert rest.done == whole.done


async def test_a_run_waits_for_a_block_that_nobody_serves_and_says_so(
    local, checkpoint, autojump_clock
):
    job = job_of(local, steps=2, evaluation=None)
    alone = await run(job, local)
    async with open_training_swarm(checkpoint, FOUR[:3]) as swarm:
        said = []

        def report(event):
            said.append(event)
            if isinstance(event, Waiting):
                swarm.add("late", 3, 4)

        async with swarm.training(report=report) as training:
            through = await run(job, training)
    assert any("block 3" in event.why.lower() for event in said if isinstance(event, Waiting))
    assert through.losses == pytest.approx(alone.losses, rel=1e-4)
