"""What tuning the bundled model on documentation strings takes off its validation loss.

Everything is done by the commands themselves: ``petalnode run`` twice, ``petalnode tune`` once for
each method, on the files of ``benchmarks.docstrings``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.docstrings import write
from benchmarks.machine import ROOT
from benchmarks.processes import Swarm, environment, open_swarm
from benchmarks.report import Result, Table, Target

DEMO = ROOT / "node" / "demo"
SPANS = ("0:4", "4:8")
METHODS = {
    "prompt": ("--prompt-tokens", "16", "--lr", "0.1"),
    "deep-prompt": ("--prompt-tokens", "16", "--lr", "0.02"),
    "lora": ("--rank", "8", "--lr", "0.01"),
}
NAMES = {"prompt": "soft prompt", "deep-prompt": "deep prompts", "lora": "LoRA"}
STEPS, QUICK_STEPS, BATCH, EVALUATIONS = 80, 20, 8, 10
LEAST = {"prompt": 0.1, "lora": 0.15}
"""Nats a token that a method is to take off the plain model's loss, in all steps."""
DEADLINE_S = 400.0
WIDTH, HEIGHT = 61, 12


@dataclass(frozen=True)
class Curve:
    """One run: validation losses by step, and what it cost."""

    losses: Mapping[int, float]
    data: Sequence[Mapping[str, Any]]
    bytes: int
    seconds: float
    tokens_per_s: float

    @property
    def last(self) -> float:
        return self.losses[max(self.losses)]


def run(quick: bool) -> Result:
    """The methods one after the other, through the same two nodes."""
    steps = QUICK_STEPS if quick else STEPS
    with tempfile.TemporaryDirectory(prefix="petalnode-tuning-") as name:
        folder = Path(name)
        for side, held_out in (("train", False), ("eval", True)):
            write(folder / f"{side}.jsonl", held_out)
        with open_swarm(DEMO, SPANS) as swarm:
            curves = {method: tuned(swarm, folder, method, steps) for method in METHODS}
    plain = curves["lora"].losses[0]  # matrices that are still zero change nothing
    return Result(
        "Tuning: documentation strings through two nodes",
        tables=[table(curves, plain)],
        targets=[] if quick else targets(curves, plain),
        notes=[*chart(curves, plain), "", describe(curves["lora"], steps)],
        values={"plain": plain} | {method: dict(one.losses) for method, one in curves.items()},
    )


def tuned(swarm: Swarm, folder: Path, method: str, steps: int) -> Curve:
    """One ``petalnode tune``."""
    out = folder / method
    files = ["--data", folder / "train.jsonl", "--eval", folder / "eval.jsonl", "--out", out]
    size = ["--steps", steps, "--batch-size", BATCH, "--save-every", steps // EVALUATIONS]
    verb = ["tune", DEMO, "--join", swarm.invite, "--json", "--method", method]
    words = [sys.executable, "-m", "petalnode", *map(str, [*verb, *files, *size])]
    started = time.monotonic()
    done = subprocess.run(
        [*words, *METHODS[method]],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    seconds = time.monotonic() - started
    events = [json.loads(line) for line in done.stdout.splitlines()]
    speeds = sorted(event["tokens_per_s"] for event in events if event["event"] == "step")
    return Curve(
        {event["step"]: event["loss"] for event in events if event["event"] == "eval"},
        [event for event in events if event["event"] == "data"],
        (out / "adapter_model.safetensors").stat().st_size,
        seconds,
        speeds[len(speeds) // 2],
    )


def table(curves: Mapping[str, Curve], plain: float) -> Table:
    """Loss before and after, and what that took."""
    head = ("Trained", "validation loss", "less than plain", "adapter", "tokens/s", "in all")
    rows = [("nothing", f"{plain:.4f}", "", "", "", "")]
    for method, curve in curves.items():
        rows.append(
            (
                NAMES[method],
                f"{curve.last:.4f}",
                f"{plain - curve.last:.4f}",
                f"{curve.bytes / 1024:.0f} KiB",
                f"{curve.tokens_per_s:.0f}",
                f"{curve.seconds:.0f} s",
            )
        )
    return Table(head, rows)


def targets(curves: Mapping[str, Curve], plain: float) -> list[Target]:
    """How much lower the loss must be."""
    return [
        Target(
            f"{NAMES[method]}: validation loss below the plain model's",
            plain - curves[method].last,
            least,
            " nats a token",
            at_least=True,
        )
        for method, least in LEAST.items()
    ]


def chart(curves: Mapping[str, Curve], plain: float) -> list[str]:
    """Validation loss by step: a letter for each method, a line for the plain model."""
    losses = [loss for curve in curves.values() for loss in curve.losses.values()]
    low, high = min(losses), max([*losses, plain])
    steps = max(max(curve.losses) for curve in curves.values())

    def row_of(loss: float) -> int:
        return round((high - loss) / (high - low) * (HEIGHT - 1))

    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    grid[row_of(plain)] = ["·"] * WIDTH
    for method, curve in curves.items():
        for step, loss in curve.losses.items():
            grid[row_of(loss)][round(step / steps * (WIDTH - 1))] = method[0].upper()
    edge = {0: f"{high:.3f}", row_of(plain): f"{plain:.3f}", HEIGHT - 1: f"{low:.3f}"}
    lines = [f"{edge.get(i, ''):>6} │{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    axis = f"{'':6} └{'─' * WIDTH}", f"{'':6}  0{f'step {steps}':>{WIDTH - 1}}"
    legend = "Validation loss, nats a token (P soft prompt, D deep prompts, L LoRA, · plain):"
    return [legend, "", "```", *lines, *axis, "```"]


def describe(curve: Curve, steps: int) -> str:
    """What was trained on, in words."""
    held_out, train = curve.data
    return (
        f"{train['rows']:,} documentation strings of this Python's standard library, "
        f"{train['tokens']:,} tokens, {steps} steps of {BATCH} strings; validated on "
        f"{held_out['rows']} strings, {held_out['tokens']:,} tokens, of files that neither these "
        "runs nor the bundled model's training saw. Two nodes with half of the blocks each; times "
        "include starting, reading the data and validating."
    )
