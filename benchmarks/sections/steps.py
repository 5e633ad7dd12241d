"""ms a decode step through 1, 2 and 3 nodes, and what one more hop costs (tiny model)."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import open_swarm, open_worker
from benchmarks.report import Result, Table, Target, figure
from benchmarks.rounds import Steps, decode_rounds, prefill_rounds, same_tokens

SPANS = (("0:8",), ("0:4", "4:8"), ("0:3", "3:6", "6:8"))
PREFIX = 128
HOP_LIMIT_MS = 2.0


def run(quick: bool) -> Result:
    """Measure with all processes up at once; those that are not asked wait."""
    model = checkpoint("tiny")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(open_worker(name, model))
            for name in ("transformers", "blocks")
        }
        for spans in SPANS:
            swarm = stack.enter_context(open_swarm(model, spans))
            workers[nodes(spans)] = stack.enter_context(open_worker("swarm", model, swarm))
        rtts = [ms for worker in workers.values() for ms in worker.ask(do="ready")["rtts_ms"]]
        prefill_rounds(workers, 1, PREFIX)
        decode_rounds(workers, 1, 20)  # warm up
        taken = decode_rounds(workers, 3 if quick else 12, 40 if quick else 100)
    return summary(taken, min(rtts))


def nodes(spans: tuple[str, ...]) -> str:
    return f"{len(spans)} node{'s' if len(spans) > 1 else ''}"


def summary(taken: dict[str, Steps], rtt_ms: float) -> Result:
    compute = taken["blocks"].median
    rows = []
    for name, steps in taken.items():
        trips = int(name[0]) + 1 if name[0].isdigit() else 0
        floor = compute + trips * rtt_ms / 2
        over = figure(steps.median - floor) if trips else ""
        shown = [figure(ms) for ms in (steps.median, steps.least)]
        rows.append([label(name), *shown, figure(1e3 / steps.median), over])
    hop = (taken["3 nodes"].median - taken["1 node"].median) / 2
    head = ("", "ms a step", "best round", "steps/s", "ms over the floor")
    return Result(
        f"Decode steps: tiny Llama (8 blocks of hidden 256), prefix {PREFIX}",
        tables=[Table(head, rows)],
        targets=[Target("one more hop, (3 nodes − 1 node) / 2", hop, HOP_LIMIT_MS, " ms")],
        notes=[
            "The floor: the blocks' compute in one process, and S+1 one-way trips of half a ping "
            f"({figure(rtt_ms)} ms round trip). {same_tokens(taken)}"
        ],
        values={name: steps.median for name, steps in taken.items()} | {"hop_ms": hop},
    )


def label(name: str) -> str:
    """How a variant is shown."""
    local = {"transformers": "local transformers", "blocks": "petalnode's blocks, no network"}
    return local.get(name, f"swarm, {name}")
