"""From process start to a node that serves, and to a client's first token; processes and memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import Child, environment, open_child, petalnode
from benchmarks.report import Result, Table, Target, figure

READY_S, FIRST_TOKEN_S, MEMORY_MB = 4.0, 3.5, 400.0
PROMPT = "def main():\n"


def run(quick: bool) -> Result:
    """Start a node and a client, a few times."""
    model = checkpoint("tiny")
    samples: dict[str, list[float]] = {}
    for _ in range(1 if quick else 4):
        for name, value in one_start(model).items():
            samples.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rows = [[name, figure(medians[name]), figure(min(samples[name]))] for name in samples]
    worst = max(samples["node: processes"])
    return Result(
        "Start: tiny Llama, one node, one client",
        tables=[Table(("", "median", "least"), rows)],
        targets=[
            Target("node ready after", medians["node: s to ready"], READY_S, " s"),
            Target("processes of a node", worst, 1.0),
            Target("memory of a node", medians["node: MB resident"], MEMORY_MB, " MB"),
            Target(
                "client's first token after", medians["client: s to token"], FIRST_TOKEN_S, " s"
            ),
        ],
        notes=["Memory is taken after the node has served one session. MB are 10⁶ bytes."],
        values=medians,
    )


def one_start(model: Path) -> dict[str, float]:
    """One node and one client, from process start on."""
    with tempfile.TemporaryDirectory(prefix="petalnode-bench-") as home:
        verb = [*petalnode(), "run", str(model), "--json", "--host", "127.0.0.1"]
        started = time.monotonic()
        with open_child([*verb, "--identity", f"{home}/key"], environment()) as node:
            invite = node.hear("listening")["invite"]
            listening = time.monotonic() - started
            node.hear("ready")
            ready = time.monotonic() - started
            client = first_token(model, invite)
            return {
                "node: s to listening": listening,
                "node: s to ready": ready,
                "client: s to token": client,
                **footprint(node),
            }


def first_token(model: Path, invite: str) -> float:
    """Seconds from the start of ``petalnode generate`` to its first token."""
    verb = [*petalnode(), "generate", str(model), PROMPT, "--json", "--join", invite]
    started = time.monotonic()
    with open_child([*verb, "--max-new-tokens", "8"], environment()) as client:
        client.hear("token")
        taken = time.monotonic() - started
        client.hear("done")
        return taken


def footprint(node: Child) -> dict[str, float]:
    """Processes and MB of a node."""
    process = psutil.Process(node.pid)
    memory = process.memory_full_info()
    return {
        "node: processes": 1.0 + len(process.children(recursive=True)),
        "node: threads": float(process.num_threads()),
        "node: MB resident": memory.rss / 1e6,
        "node: MB of its own (PSS)": memory.pss / 1e6,
    }
