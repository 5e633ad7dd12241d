"""A whole training run: steps, validation, saving, and going on where one was left.

    async with node.open_training() as training:
        await tune(job, training, await node.client_parts(), training.compute, report)

Saved is only what can go on: a step after which a forward pass, of the validation or else of the
next batch, gave a finite loss. A run that is cancelled, or loses its swarm, saves the last such
step first: where it was cut in a forward pass, the step before the last. A run that is taken up
again is saved at once: whatever ended it may have left another step's adapter beside its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import trio
from torch import Tensor

from petalnode.compute import Compute
from petalnode.errors import PetalnodeError, UsageError
from petalnode.events import (
    Report,
    TuningDone,
    TuningEval,
    TuningResumed,
    TuningSaved,
    TuningStep,
    TuningValidating,
    ignore,
)
from petalnode.models.checkpoint import Checkpoint
from petalnode.models.client import ClientParts
from petalnode.models.config import ModelConfig
from petalnode.models.tuning.peft_files import Adapter
from petalnode.training.checkpoints import (
    Progress,
    check_free,
    check_same_run,
    load_run,
    save_run,
)
from petalnode.training.data import Dataset, Reading, Shuffle, read_dataset
from petalnode.training.encoding import Encoder, Row
from petalnode.training.protocol import MAX_MICRO_TOKENS
from petalnode.training.tuner import StepFailed, Training, TuneOptions, Tuner, new_parameters


@dataclass(frozen=True, eq=False)
class TuneJob:
    """What is trained on what. Without ``out`` nothing is saved.

    Every ``save_every`` steps, and after the last, the loss on ``evaluation`` is taken and the run
    saved; let ``out`` be ``claimed`` meanwhile. ``saved`` is a run to go on with, ``started`` as in
    ``Progress``; ``dtype`` is what was asked of the client's part.
    """

    checkpoint: Checkpoint
    options: TuneOptions
    data: Dataset
    evaluation: Dataset | None = None
    out: Path | None = None
    save_every: int = 25
    started: str = ""
    dtype: str = "auto"
    saved: tuple[Progress, Mapping[str, Tensor]] | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the run."""
        return {
            "model": self.checkpoint.fingerprint,
            **self.options.to_json(),
            "dtype": self.dtype,
            "data": self.data.digest,
        }

    def resumed(self) -> TuneJob:
        """The job with the run that ``out`` has. Raises ``UsageError`` where it is another's."""
        assert self.out is not None
        saved = load_run(self.out)
        check_same_run(self.out, saved[0], self.settings())
        return replace(self, saved=saved)

    def begun(self) -> TuneJob:
        """The job in an ``out`` of its own. Raises ``UsageError`` where something is there."""
        if self.out is not None:
            check_free(self.out)
        return self


def longest_row(config: ModelConfig, options: TuneOptions) -> int:
    """How many tokens of a row can be learned from. Raises ``UsageError`` if there is no room."""
    room = min(config.max_positions, MAX_MICRO_TOKENS) - options.virtual_tokens
    if room < 2:
        raise UsageError(
            f"A prompt of {options.virtual_tokens} tokens leaves no room for text in the model's "
            f"context of {config.max_positions}.",
            "Lower --prompt-tokens.",
        )
    return room


def read_examples(
    checkpoint: Checkpoint,
    options: TuneOptions,
    path: Path,
    started: str = "",
    reading: Reading | None = None,
) -> Dataset:
    """The examples of a file as this model and these options take them.

    ``started``, an ISO time, is the date that chat templates see, by default the present. Raises
    ``UsageError`` as ``read_dataset`` does, ``ModelError`` for chats where there is no template.
    """
    longest = longest_row(checkpoint.config, options)
    clock = partial(datetime.fromisoformat, started) if started else datetime.now
    encoder = Encoder(checkpoint.config, checkpoint.tokenizer(), checkpoint.chat_template, clock)
    return read_dataset(path, encoder, longest, reading)


async def tune(
    job: TuneJob,
    training: Training,
    client: ClientParts,
    compute: Compute,
    report: Report = ignore,
) -> TuningDone:
    """Train to the last step, and return the event that says how it ended.

    Raises what ``Tuner.step`` and ``report`` raise: after all but ``StepFailed`` the last step that
    can go on is saved first, as it is when this is cancelled.
    """
    tuner = await compute.run(partial(_begin, job, training, client, compute))
    run = _Run(job, tuner, compute, report)
    try:
        await run.go()
    except StepFailed:
        raise  # the parameters may be on their way to nowhere: what was saved is better
    except (PetalnodeError, OSError, trio.Cancelled) as error:  # OSError: nobody hears the report
        with trio.CancelScope(shield=True):
            await run.leave()
        if isinstance(error, PetalnodeError):
            _tell_the_way_on(error, run.saved)
        raise
    done = TuningDone(run.progress.loss, run.eval_loss, tuner.done)
    report(done)
    return done


def _tell_the_way_on(error: PetalnodeError, saved: int) -> None:
    """Let the remedy of what ended a run name the step that is saved of it, if one is."""
    if saved and "--resume" not in error.remedy:
        error.remedy = f"{error.remedy} Then --resume goes on after step {saved}.".lstrip()


def _begin(job: TuneJob, training: Training, client: ClientParts, compute: Compute) -> Tuner:
    config = job.checkpoint.config
    parameters = new_parameters(job.options, config, client, job.data.rows)
    tuner = Tuner(training, client, compute, job.options, parameters)
    if job.saved is not None:
        progress, state = job.saved
        tuner.restore(progress.step, state)
    return tuner


class _Run:
    """A run under way. ``progress`` is that of the last step, ``eval_loss`` of the last validation;
    ``saved`` is the step that is on the disk, 0 where none is."""

    def __init__(self, job: TuneJob, tuner: Tuner, compute: Compute, report: Report) -> None:
        self._job, self._tuner, self._compute, self._report = job, tuner, compute, report
        self._shuffle = Shuffle(len(job.data.rows), job.options.seed)
        started = job.started or datetime.now().isoformat()
        self.progress = job.saved[0] if job.saved else Progress(job.settings(), started)
        self._previous = self.progress
        self.eval_loss: float | None = None
        self.saved = self._first = tuner.done
        self._began = 0.0

    async def go(self) -> None:
        """All steps that are missing, and the evaluations that are due."""
        if self._job.saved is not None:
            self._report(TuningResumed(str(self._job.out), self._tuner.done))
            await self._save_anew()
        while True:
            last = self._tuner.done >= self._job.options.steps
            if last or self._due():
                await self._evaluate()
                await self._look_ahead()
                await self.save()
            if last:
                return
            await self._step()

    def _due(self) -> bool:
        """Whether a validation and a save are due before the next step. The last step of a run that
        was taken up again had both."""
        seen = self._job.saved is not None and self._tuner.done == self._first
        return self._tuner.done % self._job.save_every == 0 and not seen

    async def leave(self) -> None:
        """Save the last step that can go on."""
        await self._compute.run(self._tuner.step_back)
        if self._tuner.done < self.progress.step:
            self.progress = self._previous
        await self.save()

    async def save(self) -> None:
        """Save the last step, if it is not."""
        if self.saved != self._tuner.done:
            await self._save_anew()

    async def _save_anew(self) -> None:
        if self._job.out is None:
            return
        await self._compute.run(partial(self._write, self._job.out))
        self.saved = self._tuner.done
        self._report(TuningSaved(str(self._job.out), self._tuner.done))

    def _write(self, out: Path) -> None:
        tuner, checkpoint = self._tuner, self._job.checkpoint
        tuning = tuner.parameters.tuning().map(Tensor.clone)
        prompt = tuner.parameters.prompt
        adapter = Adapter(tuning, None if prompt is None else prompt.detach().clone())
        save_run(out, self.progress, tuner.state(), adapter, checkpoint.config, checkpoint.name)

    def _next_rows(self) -> list[Row]:
        rows = self._job.data.rows
        chosen = self._shuffle.batch(self._tuner.done, self._job.options.batch_size)
        return [rows[index] for index in chosen]

    async def _step(self) -> None:
        options, rows = self._job.options, self._next_rows()
        before = trio.current_time()
        if self._tuner.done == self._first:
            self._began = before
        result = await self._tuner.step(rows)
        now, done = trio.current_time(), self._tuner.done
        self._previous = self.progress
        self.progress = replace(self.progress, step=done, loss=result.loss)
        each = (now - self._began) / (done - self._first)
        self._report(
            TuningStep(
                step=done,
                steps=options.steps,
                loss=result.loss,
                tokens_per_s=round(result.positions / max(now - before, 1e-9), 1),
                learning_rate=options.rate_at(done - 1),
                seconds_left=round(each * (options.steps - done), 1),
            )
        )

    async def _look_ahead(self) -> None:
        """Where there was no validation: see that what is to be saved can go on."""
        unknown = self._tuner.done > self.saved and self._job.evaluation is None
        if unknown and self._job.out is not None:
            await self._tuner.evaluate(self._next_rows(), kind="training")

    async def _evaluate(self) -> None:
        done = self._tuner.done
        if self._job.evaluation is None:
            return
        hear = partial(self._hear, done)
        self.eval_loss = await self._tuner.evaluate(self._job.evaluation.rows, hear=hear)
        self._report(TuningEval(done, self.eval_loss))

    def _hear(self, step: int, done: int, total: int) -> None:
        self._report(TuningValidating(step, done, total))
