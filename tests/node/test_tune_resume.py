"""Training runs after their death, their end, or somebody's hand in their files."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from petalnode.errors import NoRoute, UsageError
from petalnode.events import TuningDone, TuningEval, TuningSaved, TuningStep, TuningValidating
from petalnode.training import checkpoints
from petalnode.training.checkpoints import ASIDE, STATE, check_free, claimed, load_run
from petalnode.training.tuning_run import tune

from .tuning_jobs import examples, job_of, run, training

__all__ = ["training"]

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def kills(tmp_path, monkeypatch):
    """Copies of ``out`` as a kill just before and after each rename would leave it."""
    copies, replace = [], os.replace

    def copied():
        copies.append(tmp_path / f"killed-{len(copies)}")
        shutil.copytree(tmp_path / "out", copies[-1])

    def replaced(old, new):
        ours = new.parent == tmp_path / "out"  # others keep files in caches
        if ours:
            copied()
        replace(old, new)
        if ours:
            copied()

    monkeypatch.setattr(checkpoints.os, "replace", replaced)
    return copies


async def test_a_kill_at_any_moment_of_a_save_leaves_what_resume_makes_whole(
    training, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        copies = kills(tmp_path, patch)
        whole = await run(job_of(training, tmp_path / "out", steps=2, save_every=1), training)
    adapter = [(tmp_path / "out" / name).read_bytes() for name in ADAPTER]
    assert len(copies) == 2 * 2 * 3
    stale = 0
    for out in copies:
        there = [(out / name).exists() and (out / name).read_bytes() for name in ADAPTER]
        if not (out / STATE).exists():
            assert [path.name for path in out.iterdir()] == [ASIDE]
            job = job_of(training, out, steps=2, save_every=1).begun()
        else:
            stale += load_run(out)[0].step == 2 and there != adapter
            job = job_of(training, out, steps=2, save_every=1).resumed()
        again = await run(job, training)
        assert [(out / name).read_bytes() for name in ADAPTER] == adapter
        assert again.done == whole.done
        assert not (out / ASIDE).exists()
    assert stale


async def test_a_run_that_is_taken_up_again_has_its_adapter_before_anything_is_asked(
    training, tmp_path
):
    whole = job_of(training, tmp_path / "out", steps=2)
    await run(whole, training)
    adapter = [(tmp_path / "out" / name).read_bytes() for name in ADAPTER]
    for name in ADAPTER:
        (tmp_path / "out" / name).unlink()

    def gone(kind):
        raise NoRoute("Nobody serves block 2.")

    training.before = gone
    with pytest.raises(NoRoute):
        await run(whole.resumed(), training)
    assert [(tmp_path / "out" / name).read_bytes() for name in ADAPTER] == adapter


def test_what_is_there_already_can_be_gone_on_with_or_not(tmp_path):
    (tmp_path / ADAPTER[1]).touch()
    with pytest.raises(UsageError, match="already") as caught:
        check_free(tmp_path)
    assert caught.value.remedy == "Choose another --out."
    (tmp_path / STATE).touch()
    with pytest.raises(UsageError, match="already") as caught:
        check_free(tmp_path)
    assert "--resume" in caught.value.remedy


async def test_a_finished_run_is_validated_on_what_is_given_now(training, tmp_path):
    first = await run(job_of(training, tmp_path), training)
    asked = []
    training.before = asked.append
    none = await run(job_of(training, tmp_path, evaluation=None).resumed(), training)
    assert (none.losses, none.done) == ([], TuningDone(first.losses[-1], None, 6))
    assert asked == []
    same = await run(job_of(training, tmp_path).resumed(), training)
    assert (same.losses, same.done) == ([], first.done)
    other = await run(job_of(training, tmp_path, evaluation=examples(3, 1)).resumed(), training)
    assert other.done.eval_loss == other.of(TuningEval)[0].loss != first.done.eval_loss
    assert [event.step for event in other.of(TuningEval)] == [6]


async def test_a_validation_loss_of_another_step_is_not_that_of_the_end(training, tmp_path):
    await cut_in_step(5, training, job_of(training, tmp_path))
    rest = await run(job_of(training, tmp_path, evaluation=None).resumed(), training)
    assert rest.done == TuningDone(rest.losses[-1], None, 6)


async def test_a_resumed_run_does_not_validate_and_save_its_first_step_twice(training, tmp_path):
    await cut_in_step(5, training, job_of(training, tmp_path))
    rest = await run(job_of(training, tmp_path).resumed(), training)
    assert [event.step for event in rest.of(TuningEval)] == [6]
    assert [event.step for event in rest.of(TuningSaved)] == [4, 6]


async def cut_in_step(step, training, job):
    """Run until the forward of a step ends with the swarm; the error."""
    log = []

    def before(kind):
        if log and isinstance(log[-1], TuningSaved) and log[-1].step == step - 1:
            training.before = lambda kind: None
            raise NoRoute("Nobody serves block 2.", "Start a node that does.")

    training.before = before
    with pytest.raises(NoRoute) as caught:
        await tune(job, training, training.client, training.compute, log.append)
    return caught.value


async def test_a_swarm_that_is_lost_leaves_a_way_on(training, tmp_path):
    error = await cut_in_step(3, training, job_of(training, tmp_path))
    assert error.remedy == "Start a node that does. Then --resume goes on after step 2."

    def gone(kind):
        raise NoRoute("Nobody serves block 2.", "Start a node that does.")

    training.before = gone
    for out in (None, tmp_path / "nothing"):
        with pytest.raises(NoRoute) as caught:
            await run(job_of(training, out), training)
        assert caught.value.remedy == "Start a node that does."


async def test_whoever_stops_listening_costs_no_step(training, tmp_path):
    """A closed pipe or terminal: what cannot be told is saved."""

    def report(event):
        if isinstance(event, TuningStep) and event.step == 4:
            raise BrokenPipeError(32, "Broken pipe")

    job = job_of(training, tmp_path, save_every=100)
    with pytest.raises(BrokenPipeError):
        await tune(job, training, training.client, training.compute, report)
    assert load_run(tmp_path)[0].step == 3


async def test_a_validation_tells_how_far_it_is(training, tmp_path):
    job = job_of(training, steps=1, batch_size=4, evaluation=examples(10, 9))
    told = [event.to_json() for event in (await run(job, training)).of(TuningValidating)]
    expected = [
        {"event": "validating", "step": step, "done": done, "total": 10}
        for step in (0, 1)
        for done in (4, 8, 10)
    ]
    assert told == expected


def tampered(out, change=None, **said):
    """Rewrite a state: its header, and its tensors by ``change``."""
    from safetensors import safe_open

    with safe_open(out / STATE, framework="pt") as file:
        header = json.loads(file.metadata()["petalnode"]) | said
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change is not None:
        change(tensors)
    save_file(tensors, out / STATE, metadata={"petalnode": json.dumps(header)})


@pytest.mark.parametrize(
    "said",
    [
        *({"step": -1}, {"step": 7}, {"step": 2.0}, {"step": True}, {"started": 5}),
        *({"started": "yesterday"}, {"started": None}, {"loss": "low"}, {"loss": math.nan}),
        *({"loss": 10**400}, {"loss": [1.0]}, {"settings": []}, {"settings": {"steps": "6"}}),
        {"eval_loss": 2.0},
    ],
)
async def test_headers_that_were_changed(training, tmp_path, said):
    await run(job_of(training, tmp_path), training)
    tampered(tmp_path)
    job_of(training, tmp_path).resumed()
    tampered(tmp_path, **said)
    with pytest.raises(UsageError, match="not a training state"):
        job_of(training, tmp_path).resumed()


def test_a_header_that_is_nested_too_deeply(training, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / STATE, metadata={"petalnode": "[" * 100_000})
    with pytest.raises(UsageError, match="not a training state"):
        job_of(training, tmp_path).resumed()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to(torch.bfloat16),
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor * math.nan,
        lambda tensor: tensor + math.inf,
        lambda tensor: -1.0 - tensor,
    ],
)
async def test_tensors_that_were_changed(training, tmp_path, change):
    await run(job_of(training, tmp_path), training)

    def one(tensors):
        name = min(name for name in tensors if name.startswith("exp_avg_sq."))
        tensors[name] = change(tensors[name])

    tampered(tmp_path, one)
    with pytest.raises(UsageError, match="not a training state"):
        job_of(training, tmp_path).resumed()


def test_directories_that_a_run_made_for_nothing_go_again(tmp_path):
    (tmp_path / "there").mkdir()

    def fail(out):
        with claimed(tmp_path / out):
            if out == "new/full":
                (tmp_path / out / "file").touch()
            raise NoRoute("Nobody serves block 2.")

    for out in ("there", "new", "new/below", "new/full"):
        with pytest.raises(NoRoute):
            fail(out)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["new", "new/full", "new/full/file", "there"]
