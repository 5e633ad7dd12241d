"""Forward and backward through 1 and 2 nodes against local transformers, and decoding beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import Child, Swarm, environment, open_child, open_swarm, open_worker
from benchmarks.report import Result, Table, Target, figure, percentile
from benchmarks.rounds import gaps_ms

SPANS = {"1 node": ("0:16",), "2 nodes": ("0:8", "8:16")}
BATCHES = {"1 × 128": (1, 128), "8 × 128": (8, 128)}
WORKS = {"forward": "forward", "both": "forward + backward"}
LOCAL_ONLY = {"pieces": "local, by micro-batches", "keeping": "local, keeping all activations"}
ONE_NODE, TWO_NODES = 0.9, 1.4
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
        seconds = rounds(workers, 1 if quick else 5)
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


def rounds(workers: dict[str, Child], count: int) -> dict[Key, list[float]]:
    """Seconds of every variant, round by round; each is warmed up first."""
    taken: dict[Key, list[float]] = {}
    for worker in workers.values():
        worker.ask(do="both", rows=1, tokens=32)
    for _ in range(count):
        for batch, (rows, tokens) in BATCHES.items():
            for name, worker in workers.items():
                kinds = ["forward", "both", *(LOCAL_ONLY if name == "local" else ())]
                for kind in kinds:
                    took = worker.ask(do=kind, rows=rows, tokens=tokens)["s"]
                    taken.setdefault((kind, batch, name), []).append(took)
    return taken


def row(what: str, which: tuple[str, str], rates: dict[Key, float], kind: str) -> list[str]:
    """Tokens a second of a work by a variant, and their share of what local does of ``kind``."""
    work, name = which
    shown = [rates[work, batch, name] for batch in BATCHES]
    shares = [rates[work, batch, name] / rates[kind, batch, "local"] for batch in BATCHES]
    return [what, *map(figure, shown), *(f"{share:.2f} ×" for share in shares)]


def throughput(seconds: dict[Key, list[float]], result: Result) -> None:
    """Tokens a second of all variants, and the targets."""
    rates = {
        key: BATCHES[key[1]][0] * BATCHES[key[1]][1] / statistics.median(samples)
        for key, samples in seconds.items()
    }
    result.values |= {f"{kind}_{batch}_{name}": r for (kind, batch, name), r in rates.items()}
    head = ("", *BATCHES, *(f"{batch}, of local" for batch in BATCHES))
    for kind, title in WORKS.items():
        table = [row(name, (kind, name), rates, kind) for name in ("local", *SPANS)]
        if kind == "both":
            table += [
                row(what, (other, "local"), rates, kind) for other, what in LOCAL_ONLY.items()
            ]
        result.tables.append(Table(head, table, f"{title}, tokens/s"))
        for batch in BATCHES:
            share = rates[kind, batch, "1 node"] / rates[kind, batch, "local"]
            what = f"{title} of {batch}, 1 node / local"
            result.targets.append(Target(what, share, ONE_NODE, " ×", at_least=True))
        share = rates[kind, "8 × 128", "2 nodes"] / rates[kind, "8 × 128", "local"]
        what = f"{title} of 8 × 128, 2 nodes of one thread / local with one"
        result.targets.append(Target(what, share, TWO_NODES, " ×", at_least=True))
    result.notes.append(
        "Local is transformers with one thread; forward + backward there checkpoints activations, "
        "as hops do: the inputs of blocks are kept, their activations computed again. A trainer "
        "that keeps all activations of its own saves that, and is shown below it. Local by "
        "micro-batches: as few rows at a time as the hops of a chain get, 256 tokens; one node "
        "alone gets 384. Products of few tokens cost more each. A batch of 1 × 128 is one "
        "micro-batch: a second node cannot speed it up. The bound of two nodes on 8 × 128, four "
        "micro-batches, is 4 / 5 of twice one node's rate each way: either waits for the other "
        "while the first or the last is computed."
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
