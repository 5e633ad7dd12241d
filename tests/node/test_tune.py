"""Training runs: saved and taken up again, ended in every way."""

import errno
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import trio

from petalnode.cli.arguments import parse_arguments
from petalnode.cli.tune import Reporter, prepare
from petalnode.errors import NoRoute, PetalnodeError, UsageError
from petalnode.events import TuningEval, TuningSaved, TuningStep
from petalnode.models.tuning.peft_files import load_adapter
from petalnode.training import checkpoints
from petalnode.training import loss as losses
from petalnode.training.checkpoints import STATE, claimed, load_run
from petalnode.training.loss import make_batch
from petalnode.training.tuner import (
    METHODS,
    StepFailed,
)

from .local_training import LocalTraining
from .tuning_jobs import OPTIONS, examples, job_of, rows_of_batch, run, training

__all__ = ["training"]


async def test_a_run_reports_evaluates_and_saves(training, tmp_path):
    log = await run(job_of(training, tmp_path / "out", steps=5), training)
    assert [event.step for event in log.of(TuningStep)] == [1, 2, 3, 4, 5]
    assert [event.step for event in log.of(TuningEval)] == [0, 2, 4, 5]
    assert [event.step for event in log.of(TuningSaved)] == [2, 4, 5]
    assert log.done.to_json() == {
        "event": "done",
        "loss": log.losses[-1],
        "eval_loss": log.of(TuningEval)[-1].loss,
        "steps": 5,
    }
    last = log.of(TuningStep)[-1]
    assert (last.steps, last.seconds_left) == (5, 0.0)
    assert last.tokens_per_s > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", STATE}


@pytest.mark.parametrize("method", METHODS)
async def test_what_is_saved_is_what_was_trained(training, tmp_path, method):
    """The adapter's files give the validation loss that the run ended with."""
    job = job_of(training, tmp_path, method=method)
    log = await run(job, training)
    adapter = load_adapter(tmp_path, training.checkpoint.config)
    total = tokens = 0
    for one in job.evaluation.rows:
        batch = make_batch([one], job.options.virtual_tokens)
        hidden = batch.hidden(training.client, adapter.prompt)
        output, _ = await training.forward(hidden, batch.lengths, tuning=adapter.tuning)
        total += losses.summed_loss(training.client, batch, output)
        tokens += sum(one.learned)
    assert total / tokens == pytest.approx(log.done.eval_loss, rel=1e-6)
    kind = {"LORA": "lora", "PROMPT_TUNING": "prompt"}
    said = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind.get(said, "deep-prompt") == method


@pytest.mark.parametrize("method", METHODS)
async def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(training, tmp_path, method):
    whole = await run(job_of(training, tmp_path / "whole", method=method), training)
    with trio.CancelScope() as scope:
        training.before = cut_at(12, scope.cancel)  # in the backward of step 4
        await run(job_of(training, tmp_path / "cut", method=method), training)
    assert scope.cancelled_caught
    training.before = lambda kind: None
    progress, _ = load_run(tmp_path / "cut")
    assert progress.step == 3

    job = job_of(training, tmp_path / "cut", method=method).resumed()
    rest = await run(job, training)
    assert rest.losses == whole.losses[progress.step :]
    assert rest.done == whole.done
    for name in ("adapter_model.safetensors", STATE):
        one, other = (tmp_path / run / name for run in ("whole", "cut"))
        if name == STATE:
            states = [load_run(path.parent)[1] for path in (one, other)]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        else:
            assert one.read_bytes() == other.read_bytes()


def cut_at(calls, cut):
    """Calls ``cut`` at the n-th forward or backward."""
    seen = 0

    def before(kind):
        nonlocal seen
        seen += 1
        if seen == calls:
            cut()

    return before


@pytest.mark.parametrize(("calls", "step"), [(13, 4), (14, 5)])
async def test_an_interrupt_saves_the_last_step_that_can_go_on(training, tmp_path, calls, step):
    """In the forward of step 6 it is not known whether there is a way on from step 5."""
    with trio.CancelScope() as scope:
        training.before = cut_at(calls, scope.cancel)
        await run(job_of(training, tmp_path, save_every=100), training)
    whole = await run(job_of(training, tmp_path / "whole", steps=6), training)
    progress = load_run(tmp_path)[0]
    assert (progress.step, progress.loss) == (step, whole.losses[step - 1])
    training.before = lambda kind: None
    rest = await run(job_of(training, tmp_path).resumed(), training)
    assert rest.losses == whole.losses[step:]


async def test_the_last_evaluation_is_made_up_for(training, tmp_path):
    whole = await run(job_of(training, tmp_path / "whole", save_every=100), training)
    with trio.CancelScope() as scope:
        training.before = cut_at(2 + 2 * OPTIONS["steps"] + 2, scope.cancel)
        await run(job_of(training, tmp_path / "cut", save_every=100), training)
    training.before = lambda kind: None
    rest = await run(job_of(training, tmp_path / "cut").resumed(), training)
    assert rest.losses == whole.losses[-1:]
    assert rest.done == whole.done
    assert rest.done.eval_loss != whole.of(TuningEval)[0].loss


async def test_a_swarm_that_is_lost_costs_no_step(training, tmp_path):
    def gone():
        raise NoRoute("Nobody serves block 2.")

    training.before = cut_at(10, gone)  # in the backward of step 4
    with pytest.raises(NoRoute):
        await run(job_of(training, tmp_path, save_every=100), training)
    assert load_run(tmp_path)[0].step == 3


async def test_a_loss_that_is_no_number_names_its_step_and_keeps_the_last_good_run(
    training, tmp_path, monkeypatch
):
    real = losses.mean_loss_and_gradient
    seen = []

    def broken(client, batch, output):
        loss, grad = real(client, batch, output)
        seen.append(loss)
        return (math.nan if len(seen) == 4 else loss), grad

    monkeypatch.setattr("petalnode.training.tuner.mean_loss_and_gradient", broken)
    with pytest.raises(StepFailed, match="loss of step 4 is nan"):
        await run(job_of(training, tmp_path), training)
    assert load_run(tmp_path)[0].step == 2
    assert load_adapter(tmp_path, training.checkpoint.config)


@pytest.mark.parametrize(
    ("calls", "said"), [(8, "Step 3: "), (6, "Validation loss after step 2: ")]
)
async def test_numbers_that_the_chain_cannot_take_are_not_saved(training, tmp_path, calls, said):
    """A hop finds infinity first: that too names the step, and what was saved stays."""

    def overflow():
        raise UsageError("Block 2 makes infinite numbers.", "Lower the learning rate.")

    await run(job_of(training, tmp_path, steps=1), training)
    before = (tmp_path / STATE).read_bytes()
    training.before = cut_at(calls, overflow)
    with pytest.raises(StepFailed) as caught:
        await run(job_of(training, tmp_path, evaluation=examples(3, 9)), training)
    assert caught.value.cause == said + "Block 2 makes infinite numbers."
    kept = load_run(tmp_path)[0].step
    assert kept == 2 if calls == 8 else (tmp_path / STATE).read_bytes() == before


async def test_what_has_no_finite_loss_after_it_is_not_saved(training, tmp_path, monkeypatch):
    """Without a validation the next batch tells: here what step 4 led to has no number."""
    real, seen = losses.summed_loss, []

    def broken(client, batch, output):
        seen.append(batch.lengths)
        return math.nan if len(seen) == 2 else real(client, batch, output)

    monkeypatch.setattr("petalnode.training.tuner.summed_loss", broken)
    job = job_of(training, tmp_path, evaluation=None)
    with pytest.raises(StepFailed, match="training loss after step 4 is nan"):
        await run(job, training)
    assert load_run(tmp_path)[0].step == 2
    batches = [rows_of_batch(job, number) for number in (2, 4)]
    assert seen == [[len(one.ids) - 1 for one in rows] for rows in batches]


async def test_nobody_looks_ahead_where_nothing_is_saved(training):
    asked = []
    training.before = asked.append
    await run(job_of(training, evaluation=None), training)
    assert asked == ["forward", "backward"] * OPTIONS["steps"]


async def test_a_full_disk_keeps_what_was_saved(training, tmp_path, monkeypatch):
    await run(job_of(training, tmp_path, steps=2), training)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for where in ("petalnode.training.checkpoints.save_file", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(PetalnodeError) as caught:
                await run(job_of(training, tmp_path, steps=3), training)
        assert "No space left on device; what was saved before is still there" in (
            caught.value.cause
        )
        assert "--resume" in caught.value.remedy
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


async def test_a_disk_that_is_full_from_the_beginning_leaves_nothing_to_resume(
    training, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("petalnode.training.checkpoints.save_file", full)
    with pytest.raises(PetalnodeError, match=r"No space left on device\.") as caught:
        await run(job_of(training, tmp_path, steps=3), training)
    assert "--resume" not in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_run_left_aside_does_not_matter(training, tmp_path):
    (tmp_path / checkpoints.ASIDE).mkdir()
    (tmp_path / checkpoints.ASIDE / STATE).write_bytes(b"half")
    await run(job_of(training, tmp_path, steps=1).begun(), training)
    assert load_run(tmp_path)[0].step == 1
    assert not (tmp_path / checkpoints.ASIDE).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 3}, "another --rank: 2, not 3"),
        ({"learning_rate": 0.5}, "another --lr: 0.02, not 0.5"),
        ({"steps": 7}, "another --steps"),
        ({"method": "prompt"}, "another --method: lora, not prompt"),
        ({"dtype": "bfloat16"}, "another --dtype: auto, not bfloat16"),
        ({"data": examples(3)}, "another --data."),
    ],
)
async def test_a_run_is_resumed_as_it_was_begun_or_not_at_all(training, tmp_path, changes, said):
    await run(job_of(training, tmp_path), training)
    with pytest.raises(UsageError) as caught:
        job_of(training, tmp_path, **changes).resumed()
    assert said in caught.value.cause


async def test_a_run_of_another_model_is_not_resumed(training, tmp_path, tiny_checkpoint):
    await run(job_of(training, tmp_path), training)
    other = LocalTraining(tiny_checkpoint(seed=1))
    with pytest.raises(UsageError, match="begun with another model"):
        job_of(other, tmp_path).resumed()


async def test_the_time_of_its_beginning_stays_with_a_run(training, tmp_path, capsys):
    """Chat templates see it as the date: a run that is taken up again must see the same."""
    began = "1999-01-02T03:04:05"
    await run(job_of(training, tmp_path / "out", steps=1, started=began), training)
    assert load_run(tmp_path / "out")[0].started == began
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the quick fox"}')
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--resume"]
    arguments = parse_arguments(["tune", "a model", *flags], {})
    job = prepare(training.checkpoint, arguments, Reporter(arguments))
    assert job.started == began
    assert "1 example" in capsys.readouterr().err


async def test_files_are_on_the_disk_before_they_have_their_names(training, tmp_path, monkeypatch):
    told, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        told.append(("synced", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def replaced(old, new):
        told.append(("renamed", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(checkpoints.os, "fsync", synced)
    monkeypatch.setattr(checkpoints.os, "replace", replaced)
    await run(job_of(training, tmp_path, steps=1), training)
    files = [path.stat().st_ino for path in tmp_path.iterdir()]
    out, state = (path.stat().st_ino for path in (tmp_path, tmp_path / STATE))
    told = [one for one in told if one[1] in {*files, out}]  # others keep files in caches
    assert {told.pop(0) for _ in range(3)} == {("synced", file) for file in files}
    assert told[:2] == [("renamed", state), ("synced", out)]
    assert {told.pop(2) for _ in range(2)} == {("renamed", file) for file in {*files} - {state}}
    assert told[2:] == [("synced", out)]


async def test_nothing_is_overwritten(training, tmp_path):
    await run(job_of(training, tmp_path, steps=1), training)
    with pytest.raises(UsageError, match="already"):
        job_of(training, tmp_path).begun()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="not a directory"):
        job_of(training, file).begun()


def test_a_place_that_takes_no_files_is_refused_before_anything_is_trained(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=r"Nothing can be saved in .*Not a directory"):
        claimed(file / "out").__enter__()
    with claimed(tmp_path / "new" / "out"):
        assert list((tmp_path / "new" / "out").iterdir()) == []


def test_two_runs_are_kept_out_of_one_directory(tmp_path):
    with claimed(tmp_path / "out"):
        with pytest.raises(UsageError, match=r"Another run is saving in .*out now\."):
            claimed(tmp_path / "out").__enter__()
        with claimed(tmp_path / "other"):
            pass
    with claimed(tmp_path / "out"):
        pass


def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoints.fcntl, "flock", refuse)
    with claimed(tmp_path), claimed(tmp_path):
        pass


def test_states_that_cannot_be_read(training, tmp_path):
    job = job_of(training, tmp_path)
    with pytest.raises(UsageError, match="no training run to resume"):
        job.resumed()
    for content in (b"", b"{}", b"\xff" * 100):
        (tmp_path / STATE).write_bytes(content)
        with pytest.raises(UsageError, match="not a training state"):
            job.resumed()


@pytest.mark.parametrize(
    "header",
    [
        *(None, [], {}, {"format": 2}, {"format": 1}, {"format": 1, "x": 1}),
        {"format": 1, "settings": {}, "started": "", "step": "many"},
    ],
)
def test_headers_that_are_none_of_ours(training, tmp_path, header):
    from safetensors.torch import save_file

    metadata = {} if header is None else {"petalnode": json.dumps(header)}
    save_file({"x": torch.zeros(1)}, tmp_path / STATE, metadata=metadata)
    with pytest.raises(UsageError, match="not a training state"):
        job_of(training, tmp_path).resumed()


async def test_tensors_that_do_not_fit_their_settings(training, tmp_path):
    await run(job_of(training, tmp_path), training)
    job = job_of(training, tmp_path).resumed()
    progress, state = job.saved
    job = replace(job, saved=(progress, {name: tensor[:1] for name, tensor in state.items()}))
    with pytest.raises(UsageError, match="other tensors"):
        await run(job, training)
