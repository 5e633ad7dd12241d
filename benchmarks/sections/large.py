"""Decode and prefill of a 246M-parameter Llama on 1 and 2 nodes against local transformers."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import Child, open_swarm, open_worker
from benchmarks.report import Result, Table, Target, figure
from benchmarks.rounds import Steps, decode_rounds, prefill_rounds, same_tokens

SPANS = {"1 node": ("0:16",), "2 nodes": ("0:8", "8:16")}
PREFIXES = (128, 1024)
DECODE_SHARE = 0.9
PREFILL_LIMIT = 1.15


def run(quick: bool) -> Result:
    """Measure with all processes up at once; those that are not asked wait."""
    model = checkpoint("246M")
    with ExitStack() as stack:
        workers = {"local": stack.enter_context(open_worker("transformers", model))}
        for name, spans in SPANS.items():
            swarm = stack.enter_context(open_swarm(model, spans))
            workers[name] = stack.enter_context(open_worker("swarm", model, swarm))
        for worker in workers.values():
            worker.ask(do="ready")
        result = Result("Large model: 246M-parameter Llama (16 blocks of hidden 1024), float32")
        for prefix in PREFIXES[:1] if quick else PREFIXES:
            measure(workers, prefix, quick, result)
    return result


def measure(workers: dict[str, Child], prefix: int, quick: bool, result: Result) -> None:
    """Prefill and decode at one prefix, into the result."""
    prefill_rounds(workers, 1, 16)
    prefills = prefill_rounds(workers, 1 if quick else 2, prefix)
    decode_rounds(workers, 1, 2)
    steps = decode_rounds(workers, 2 if quick else 5, 8 if quick else 12)
    result.notes.append(f"Prefix {prefix}: {same_tokens(steps)}")
    result.tables.append(table(prefix, prefills, steps))
    for name in ("1 node", "2 nodes"):
        result.values[f"decode_share_{name}_{prefix}"] = ratio(steps, "local", name)
        result.values[f"prefill_ratio_{name}_{prefix}"] = ratio(prefills, name, "local")
    share = Target(
        f"2 nodes at prefix {prefix}, share of local steps/s",
        ratio(steps, "local", "2 nodes"),
        DECODE_SHARE,
        at_least=True,
    )
    result.targets.append(share)
    if prefix == max(PREFIXES):
        slower = ratio(prefills, "2 nodes", "local")
        result.targets.append(
            Target(f"prefill of {prefix}, 2 nodes / local", slower, PREFILL_LIMIT, " ×")
        )


def ratio(taken: dict[str, Steps], over: str, under: str) -> float:
    """The quotient of two medians."""
    return taken[over].median / taken[under].median


def table(prefix: int, prefills: dict[str, Steps], steps: dict[str, Steps]) -> Table:
    rows = []
    for name, taken in steps.items():
        prefill = prefills[name].median
        rows.append(
            [
                "local transformers" if name == "local" else f"swarm, {name}",
                figure(taken.median),
                figure(taken.least),
                figure(1e3 / taken.median),
                f"{ratio(steps, 'local', name):.0%}",
                figure(prefill / 1e3),
                f"{ratio(prefills, name, 'local'):.2f} ×",
            ]
        )
    head = ("", "ms a step", "best round", "steps/s", "of local", "prefill s", "of local")
    return Table(head, rows, f"prefix {prefix}")
