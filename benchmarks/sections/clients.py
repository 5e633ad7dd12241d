"""Steps/s of all clients together: 1, 2, 4 and 8 client processes on the same two nodes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import Child, open_swarm, open_worker
from benchmarks.report import Result, Table, Target, figure

SPANS = {"tiny": ("0:4", "4:8"), "246M": ("0:8", "8:16")}
COUNTS = (1, 2, 4, 8)
PREFIX = 128
GAIN = 3.0
STEPS_S = {"tiny": 3.0, "246M": 4.0}
"""How long one measurement should take: the number of steps is chosen by a first one."""


def run(quick: bool) -> Result:
    """Both models, one after the other; only the tiny one in a quick run."""
    result = Result(f"Concurrent clients: processes of their own, two nodes, prefix {PREFIX}")
    head = ("", *(f"{count} clients" if count > 1 else "1 client" for count in COUNTS), "8 / 1")
    rows = [measure(name, quick, result) for name in (["tiny"] if quick else SPANS)]
    result.tables.append(Table(head, rows, "steps/s in all"))
    result.notes.append(
        "Counted over the time in which all clients of a group decode. Each client also computes "
        "its own head; nodes and clients share this machine's cores."
    )
    return result


def measure(name: str, quick: bool, result: Result) -> list[str]:
    """Groups of clients take turns, round after round; one row of the table."""
    model = checkpoint(name)
    rates: dict[int, list[float]] = {count: [] for count in COUNTS}
    with ExitStack() as stack:
        swarm = stack.enter_context(open_swarm(model, SPANS[name]))
        clients = [stack.enter_context(open_worker("swarm", model, swarm)) for _ in range(8)]
        for client in clients:
            client.ask(do="ready")
            client.ask(do="prefill", tokens=PREFIX)
        seconds = STEPS_S[name] / (2 if quick else 1)
        alone = together(clients[:1], 8)
        for _ in range(1 if quick else 2):
            for count in COUNTS:
                expected = alone * min(1.0, 4 / count)  # per client, to last about as long
                rates[count].append(together(clients[:count], max(8, int(expected * seconds))))
    medians = {count: statistics.median(rates[count]) for count in COUNTS}
    gain = medians[8] / medians[1]
    result.values |= {f"{name}_{count}": medians[count] for count in COUNTS}
    result.targets.append(Target(f"{name}: 8 clients / 1", gain, GAIN, " ×", at_least=True))
    return [name, *(figure(medians[count]) for count in COUNTS), f"{gain:.2f} ×"]


def together(clients: Sequence[Child], steps: int) -> float:
    """Steps/s of all, while all of them are decoding."""
    for client in clients:
        client.tell(do="decode", steps=steps)
    at = [client.hear()["at"] for client in clients]
    start, end = max(times[0] for times in at), min(times[-1] for times in at)
    counted = sum(start < moment <= end for times in at for moment in times)
    return counted / (end - start)
