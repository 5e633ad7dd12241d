"""A decode step over links of 50 ms each way, against what physics and compute leave."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import open_swarm, open_worker
from benchmarks.report import Result, Table, figure
from benchmarks.rounds import Steps, decode_rounds, prefill_rounds

DELAY_S = 0.05
SPANS = (("0:8",), ("0:4", "4:8"))
PREFIX = 128


def run(quick: bool) -> Result:
    """One and two nodes, every link through a relay."""
    model = checkpoint("tiny")
    with ExitStack() as stack:
        workers = {0: stack.enter_context(open_worker("blocks", model))}
        for spans in SPANS:
            swarm = stack.enter_context(open_swarm(model, spans, delay_s=DELAY_S))
            workers[len(spans)] = stack.enter_context(open_worker("swarm", model, swarm))
        rtts = {hops: worker.ask(do="ready")["rtts_ms"] for hops, worker in workers.items()}
        named = {str(hops): worker for hops, worker in workers.items()}
        prefills = prefill_rounds(named, 1 if quick else 3, PREFIX)
        taken = decode_rounds(named, 1 if quick else 3, 15 if quick else 25)
    return summary(taken, prefills, {str(hops): known for hops, known in rtts.items()})


def summary(
    taken: dict[str, Steps], prefills: dict[str, Steps], rtts: dict[str, list[float]]
) -> Result:
    compute = taken.pop("0").median
    result = Result(f"Links of {DELAY_S * 1e3:.0f} ms each way: tiny Llama, prefix {PREFIX}")
    rows = []
    for hops, steps in taken.items():
        floor = (int(hops) + 1) * DELAY_S * 1e3 + compute
        over = steps.median - floor
        rtt = figure(max(rtts[hops]))
        shown = [figure(ms) for ms in (floor, steps.median, over, prefills[hops].median)]
        rows.append([f"{hops} node{'s' if hops != '1' else ''}", rtt, *shown])
        result.values |= {f"step_ms_{hops}": steps.median, f"over_floor_ms_{hops}": over}
    head = ("", "ping ms", "floor ms", "ms a step", "over the floor", f"prefill of {PREFIX}, ms")
    result.tables.append(Table(head, rows))
    result.notes.append(
        f"The floor: S+1 one-way trips of {DELAY_S * 1e3:.0f} ms and {figure(compute)} ms of "
        "compute; relaying through the client would take 2 S trips. The relay itself is up to "
        "1 ms late each way, as its ping shows."
    )
    return result
