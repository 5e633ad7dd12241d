"""Forward and backward through 1 and 2 nodes against local transformers, and decoding beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import Child, Swarm, environment, open_child, open_swarm, open_worker
from benchmarks.report import Result, Table, Target, figure, percentile
from benchmarks.rounds import gaps_ms

SPANS = {"1 node": ("0:16",), "2 nodes": ("0:8", "8:16")}
BATCHES = {"1 × 128": (1, 128), "8 × 128": (8, 128)}
WORKS = {"forward": "forward", "both": "forward + backward"}
TWICE = "local, twice at once"
"""What the machine gives two threads, where nothing waits for anything."""
LOCAL_ONLY = {"pieces": "local, by micro-batches", "keeping": "local, keeping all activations"}
ONE_NODE, TWO_NODES = 0.9, 1.4
ROUNDS = 7
STEPS, FLOOD_S, PREFIX = 40, 20.0, 128

Key = tuple[str, str, str]
"""Work, batch, variant."""


def run(quick: bool) -> Result:
    """The variants take turns; those that are not asked wait."""
    model = checkpoint("246M")
    result = Result("Training: 246M-parameter Llama (16 blocks of hidden 1024), float32")
    with ExitStack() as stack:
        workers = {"local": stack.enter_context(open_trainer(model))}
        for name, spans in SPANS.items():
            swarm = stack.enter_context(open_swarm(model, spans))
            workers[name] = stack.enter_context(open_trainer(model, swarm))
        for worker in workers.values():
            worker.ask(do="ready")
        other = stack.enter_context(open_trainer(model))
        seconds = rounds(workers, other, 1 if quick else ROUNDS)
    throughput(seconds, result)
    beside(model, quick, result)
    return result


@contextmanager
def open_trainer(model: Path, swarm: Swarm | None = None) -> Iterator[Child]:
    """A process that trains: see ``benchmarks.trainers``."""
    verb = ["-m", "benchmarks.trainers", "swarm" if swarm else "local", str(model)]
    verb += ["--join", swarm.invite] if swarm else []
    with open_child(verb, environment()) as child:
        yield child


def rounds(workers: dict[str, Child], other: Child, count: int) -> dict[Key, list[float]]:
    """Seconds of every variant, round by round; each is warmed up first. ``other``: a second local.

    A work goes round all variants before the next work begins: what is compared lies close in time,
    for the speed of the machine drifts.
    """
    taken: dict[Key, list[float]] = {}
    for worker in (*workers.values(), other):
        worker.ask(do="both", rows=1, tokens=32)
    for _ in range(count):
        for batch, (rows, tokens) in BATCHES.items():
            for kind in (*WORKS, *LOCAL_ONLY):
                work = {"do": kind, "rows": rows, "tokens": tokens}
                for name in workers if kind in WORKS else ("local",):
                    took = workers[name].ask(**work)["s"]
                    taken.setdefault((kind, batch, name), []).append(took)
                if kind in WORKS:
                    took = at_once(workers["local"], other, work)
                    taken.setdefault((kind, batch, TWICE), []).append(took)
    return taken


def at_once(one: Child, other: Child, work: dict[str, Any]) -> float:
    """Seconds a work: half of those in which either of two, at the same time, does it once."""
    started = time.monotonic()
    other.tell(**work)
    one.ask(**work)
    other.hear()
    return (time.monotonic() - started) / 2


def shares(seconds: dict[Key, list[float]], key: Key, kind: str) -> list[float]:
    """How fast ``key`` was, as a share of what local did of ``kind`` in the same round, sorted."""
    baseline = seconds[kind, key[1], "local"]
    return sorted(one / other for one, other in zip(baseline, seconds[key], strict=True))


def row(what: str, which: tuple[str, str], seconds: dict[Key, list[float]], kind: str) -> list[str]:
    """Tokens a second of a work by a variant, and their share of what local does of ``kind``."""
    work, name = which
    rates = [
        rows * tokens / statistics.median(seconds[work, batch, name])
        for batch, (rows, tokens) in BATCHES.items()
    ]
    spread = [shares(seconds, (work, batch, name), kind) for batch in BATCHES]
    return [what, *map(figure, rates), *map(spread_of, spread)]


def spread_of(ratios: list[float]) -> str:
    """The median of sorted ratios, with the least and the greatest."""
    return f"{statistics.median(ratios):.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def throughput(seconds: dict[Key, list[float]], result: Result) -> None:
    """Tokens a second of all variants, and the targets."""
    result.values |= {
        f"{kind}_{batch}_{name}_s": samples for (kind, batch, name), samples in seconds.items()
    }
    head = ("", *BATCHES, *(f"{batch}, of local" for batch in BATCHES))
    for kind, title in WORKS.items():
        table = [row(name, (kind, name), seconds, kind) for name in ("local", *SPANS, TWICE)]
        if kind == "both":
            table += [
                row(what, (other, "local"), seconds, kind) for other, what in LOCAL_ONLY.items()
            ]
        result.tables.append(Table(head, table, f"{title}, tokens/s"))
        for batch in BATCHES:
            share = statistics.median(shares(seconds, (kind, batch, "1 node"), kind))
            what = f"{title} of {batch}, 1 node / local"
            result.targets.append(Target(what, share, ONE_NODE, " ×", at_least=True))
        share = statistics.median(shares(seconds, (kind, "8 × 128", "2 nodes"), kind))
        what = f"{title} of 8 × 128, 2 nodes of one thread / local with one"
        result.targets.append(Target(what, share, TWO_NODES, " ×", at_least=True))
    result.notes.append(
        "Rates are medians of the rounds; shares are medians of the shares of each round, with the "
        "least and the greatest. "
        "Local is transformers with one thread; forward + backward there checkpoints activations, "
        "as hops do: the inputs of blocks are kept, their activations computed again. A trainer "
        "that keeps all activations of its own saves that, and is shown below it. Local by "
        "micro-batches: as few rows at a time as the hops of a chain get, 256 tokens; one node "
        "alone gets 384. Products of few tokens cost more each. A batch of 1 × 128 is one "
        "micro-batch: a second node cannot speed it up. Local, twice at once: two processes that "
        "each do all of it, for themselves; the machine gives two threads no more than that. The "
        "bound of two nodes on 8 × 128, four micro-batches, is 4 / 5 of it: either waits for the "
        "other while the first or the last is computed. Backward, a node that waits computes "
        "activations again meanwhile."
    )


def beside(model: Path, quick: bool, result: Result) -> None:
    """A decoding client alone and beside a training one, on the same node."""
    steps = STEPS // 4 if quick else STEPS
    seconds = FLOOD_S / 2 if quick else FLOOD_S
    with ExitStack() as stack:
        swarm = stack.enter_context(open_swarm(model, SPANS["1 node"]))
        decoder = stack.enter_context(open_worker("swarm", model, swarm))
        trainer = stack.enter_context(open_trainer(model, swarm))
        decoder.ask(do="prefill", tokens=PREFIX)
        alone = gaps_ms(decoder.ask(do="decode", steps=steps)["at"])
        trainer.tell(do="flood", rows=8, tokens=128, seconds=seconds)
        during = gaps_ms(decoder.ask(do="decode", steps=steps)["at"])
        batches = trainer.hear()["batches"]
    row = [
        *(figure(percentile(gaps, share)) for gaps in (alone, during) for share in (0.5, 0.99)),
        figure(max(during)),
        figure(batches * 8 * 128 / seconds),
    ]
    head = ("", "p50 ms alone", "p99 alone", "p50 beside", "p99 beside", "longest", "trained tok/s")
    result.tables.append(Table(head, [["246M", *row]], "a decode step, alone and beside training"))
    result.values |= {"decode_p50_alone": percentile(alone, 0.5)}
    result.values |= {"decode_p50_beside": percentile(during, 0.5)}
    result.notes.append(
        "Decoding goes before training at every step, so a token waits for one step at most: one "
        "block forward, or again, or backward over one micro-batch: here 384 tokens."
    )
