"""``petalnode tune``: train prompts or LoRA through the swarm, and keep them in a directory.

The first interrupt saves the last step and leaves; a second one does not wait for that.
"""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from petalnode import events
from petalnode.cli.output import BAR_WIDTH, ProgressLine, amount, end_progress, note, reporter
from petalnode.cli.signals import asking_to_end, kill_from_now_on
from petalnode.errors import UsageError
from petalnode.events import Event, Report
from petalnode.joining import parse_joins
from petalnode.models.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from petalnode.training.data import Dataset
    from petalnode.training.tuner import TuneOptions
    from petalnode.training.tuning_run import TuneJob

SAID_EVERY = 10
"""Steps, or batches of a validation; where there is no terminal to show each."""
READ_SHOWN_BYTES = 1 << 20
"""How much more of a file is read when that is shown again."""


def main(arguments: Namespace) -> int:
    """Check and read what can be without a swarm, then train."""
    from petalnode.training.checkpoints import claimed

    if not arguments.join:
        raise UsageError(
            "There is no swarm to train through: no --join was given.",
            f"Start one with `petalnode run {arguments.model}` and pass the invite that it prints.",
        )
    parse_joins(arguments.join)
    report = Reporter(arguments)
    try:
        checkpoint = open_checkpoint(
            arguments.model, revision=arguments.revision, cache_dir=arguments.cache_dir
        )
        job = prepare(checkpoint, arguments, report)
        with claimed(Path(arguments.out)):
            job = job.resumed() if arguments.resume else job.begun()
            trio.run(train, job, arguments, report)
    finally:
        end_progress()
        report.progress.end()
    return 0


def prepare(checkpoint: Checkpoint, arguments: Namespace, report: Reporter) -> TuneJob:
    """The job that the flags describe, its data read, not begun. Raises ``UsageError`` and
    ``ModelError``."""
    from petalnode.training.checkpoints import check_free, load_run
    from petalnode.training.tuner import check_options
    from petalnode.training.tuning_run import TuneJob, read_examples

    options = options_of(arguments)
    check_options(options, checkpoint.config)
    if not arguments.out:
        raise UsageError("The directory of --out has no name.", "Name one.")
    out, started = Path(arguments.out), datetime.now().isoformat()
    if arguments.resume:
        started = load_run(out)[0].started
    else:
        check_free(out)
    read = partial(read_examples, checkpoint, options, started=started)
    evaluation = None if arguments.eval is None else read_data(Path(arguments.eval), read, report)
    return TuneJob(
        checkpoint,
        options,
        read_data(Path(arguments.data), read, report),
        evaluation,
        out,
        save_every=arguments.save_every,
        started=started,
        dtype=arguments.dtype,
    )


def options_of(arguments: Namespace) -> TuneOptions:
    """What the flags say of what is trained and how. Raises ``UsageError``."""
    from petalnode.training.tuner import TuneOptions

    return TuneOptions(
        method=arguments.method,
        **sizes_of(arguments),
        targets=tuple(arguments.target),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        seed=arguments.seed,
    )


def sizes_of(arguments: Namespace) -> dict[str, int]:
    """How large what the method trains is, where that is asked for. Raises ``UsageError`` for the
    size of what another method trains."""
    sizes = {"prompt_tokens": arguments.prompt_tokens, "rank": arguments.rank}
    given = {name: size for name, size in sizes.items() if size is not None}
    if arguments.method == "lora" and "prompt_tokens" in given:
        raise UsageError(
            "The method lora trains no prompt, so that --prompt-tokens says nothing.",
            "Leave it out, or choose --method prompt or deep-prompt.",
        )
    if arguments.method != "lora" and "rank" in given:
        raise UsageError(
            f"The method {arguments.method} trains no matrices, so that --rank says nothing.",
            "Leave it out, or choose --method lora.",
        )
    return given


def read_data(path: Path, read: Callable[..., Dataset], report: Reporter) -> Dataset:
    """One file, telling how far it is and what was found."""
    dataset = read(path, reading=report.reading(path))
    found = events.TuningData(
        file=str(path),
        rows=len(dataset.rows),
        tokens=dataset.tokens,
        learned=dataset.learned,
        cut=dataset.cut,
        dropped=dataset.dropped,
    )
    report(found)
    return dataset


async def train(job: TuneJob, arguments: Namespace, report: Report) -> None:
    """Join as a client and train, until it is done or told to stop."""
    from petalnode.node import NodeOptions, open_node
    from petalnode.training.tuning_run import tune

    options = NodeOptions(join=tuple(arguments.join), dtype=arguments.dtype)
    done = False
    with trio.open_signal_receiver(*asking_to_end(), *hanging_up()) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, signals, nursery.cancel_scope)
            async with (
                open_node(job.checkpoint, options, report) as node,
                node.open_training(report=report) as training,
            ):
                client = await node.client_parts()
                await tune(job, training, client, training.compute, report)
                done = True
            nursery.cancel_scope.cancel()
    if not done:
        raise KeyboardInterrupt


def hanging_up() -> tuple[signal.Signals, ...]:
    """SIGHUP, which a terminal sends when it closes, unless nohup had it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return () if ignored else (signal.SIGHUP,)


async def stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """The first signal cancels the scope; one more kills the process. But not one more SIGHUP: a
    terminal that closes may send two."""
    async for _ in signals:
        scope.cancel()
        kill_from_now_on()
        return


class Reporter:
    """JSON or sentences; a progress line where there is a terminal."""

    def __init__(self, arguments: Namespace) -> None:
        self.progress = ProgressLine()
        self._json, self._others = arguments.json, reporter(arguments.json)
        self._arguments = arguments
        self._sentences: dict[type[Event], Callable[..., None]] = {
            events.TuningData: self._data,
            events.TuningResumed: self._resumed,
            events.TuningStep: self._step,
            events.TuningEval: self._eval,
            events.TuningValidating: self._validating,
            events.TuningSaved: self._saved,
            events.TuningDone: self._done,
        }

    def __call__(self, event: Event) -> None:
        if self._json:
            self._others(event)
        elif (say := self._sentences.get(type(event))) is not None:
            say(event)
        else:
            self.progress.end()
            self._others(event)

    def reading(self, path: Path) -> Callable[[int, int], None]:
        """Shows how much of a file is read."""
        shown = 0

        def show(done: int, total: int) -> None:
            nonlocal shown
            if done - shown < READ_SHOWN_BYTES:
                return
            shown = done
            if self._json:
                self._others(events.Reading(str(path), done, total))
            else:
                share = 100 * done // max(total, 1)
                self.progress.show(f"reading {path}: {share} %", last=False)

        return show

    def _say(self, text: str) -> None:
        self.progress.end()
        note(text)

    def _data(self, event: events.TuningData) -> None:
        cut = f"; {event.cut} cut to the context" if event.cut else ""
        whose = "its prompt alone fills it" if event.dropped == 1 else "their prompts alone fill it"
        dropped = f"; {event.dropped} dropped, {whose}" if event.dropped else ""
        self._say(
            f"{event.file}: {amount(event.rows, 'example')}, {event.learned:,} of "
            f"{amount(event.tokens, 'token')} to learn{cut}{dropped}"
        )

    def _resumed(self, event: events.TuningResumed) -> None:
        self._say(f"going on after step {event.step} of {event.dir}")

    def _step(self, event: events.TuningStep) -> None:
        text = (
            f"step {event.step}/{event.steps}: loss {event.loss:.3f}, "
            f"{event.tokens_per_s:,.0f} tokens/s, {duration(event.seconds_left)} left"
        )
        self._far(event.step, event.steps, text, event.step % SAID_EVERY == 0)

    def _validating(self, event: events.TuningValidating) -> None:
        text = f"step {event.step}: validation, {event.done:,} of {amount(event.total, 'example')}"
        often = SAID_EVERY * self._arguments.batch_size
        self._far(event.done, event.total, text, event.done % often == 0)

    def _far(self, done: int, total: int, text: str, now: bool) -> None:
        """Show how far it is; where there is no terminal, if it is time to say so."""
        filled = BAR_WIDTH * done // total
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        self.progress.show(f"{bar} {text}", last=done == total)
        if now and not sys.stderr.isatty():
            note(text)

    def _eval(self, event: events.TuningEval) -> None:
        self._say(f"step {event.step}: validation loss {event.loss:.4f}")

    def _saved(self, event: events.TuningSaved) -> None:
        self._say(f"step {event.step}: saved in {event.dir}")

    def _done(self, event: events.TuningDone) -> None:
        found = "" if event.eval_loss is None else f", validation loss {event.eval_loss:.4f}"
        last = "" if event.loss is None else f": last loss {event.loss:.4f}{found}"
        model, out = self._arguments.model, self._arguments.out
        self._say(f"{amount(event.steps, 'step')} done{last}")
        self._say(f"use it: petalnode generate {model} PROMPT --adapter {out} --join JOIN")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
