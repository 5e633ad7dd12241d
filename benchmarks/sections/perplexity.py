"""What int8 and nf4 cost in text, and save in memory: ``benchmarks/perplexity.py`` by form."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.checkpoints import checkpoint
from benchmarks.machine import ROOT
from benchmarks.processes import environment
from benchmarks.report import Result, Table, Target

FORMS = ("float32", "bfloat16", "int8", "nf4")
QUICK_WINDOWS = "16"
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment: memory that is freed goes back at once, so that what is counted is what is held."""
MOST_DEVIATION = 10.0
"""Percent, of a span's memory from what was predicted."""


def run(quick: bool) -> Result:
    """A process for each figure, so that none inherits another's memory."""
    windows = ["--windows", QUICK_WINDOWS] if quick else []
    texts = {form: measure(form, *windows) for form in FORMS}
    folder = str(checkpoint("246M"))
    sizes = {form: measure(form, "--memory", folder, **RETURN) for form in FORMS}
    speeds = {form: measure(form, "--speed", folder) for form in FORMS}
    tokens = texts["float32"]["tokens"]
    return Result(
        "Quantization: perplexity and memory",
        tables=[text_table(texts), memory_table(sizes, speeds)],
        targets=[deviation(form, sizes[form]) for form in FORMS],
        notes=[
            f"Perplexity of the bundled model over {tokens:,} tokens of this Python's standard "
            "library that it was not trained on. The head and embeddings are never quantized; int8 "
            "and nf4 compute in float32. Memory and speed: all 16 blocks of a random Llama of "
            "246 million parameters in a fresh process; resident memory beyond what it had before; "
            "the peak while loading."
        ],
        values={"perplexity": texts, "memory": sizes, "speed": speeds},
    )


def measure(form: str, *flags: str, **variables: str) -> dict[str, Any]:
    """What the measuring process prints."""
    verb = [sys.executable, "-m", "benchmarks.perplexity", form, *flags]
    env = {**environment(), **variables}
    ran = subprocess.run(verb, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(ran.stdout)
    return measured


def text_table(texts: dict[str, dict[str, Any]]) -> Table:
    """Perplexity beside bytes."""
    exact = texts["float32"]["perplexity"]
    head = ("Blocks in", "Perplexity", "more", "bytes a parameter, blocks", "whole model")
    rows = [
        (
            form,
            f"{one['perplexity']:.3f}",
            f"{one['perplexity'] / exact - 1:+.2%}",
            f"{one['block_bytes_per_parameter']:.3f}",
            f"{one['bytes_per_parameter']:.3f}",
        )
        for form, one in texts.items()
    ]
    return Table(head, rows)


def memory_table(sizes: dict[str, dict[str, Any]], speeds: dict[str, dict[str, Any]]) -> Table:
    """Predicted and measured MiB, and speed."""
    head = ("Blocks in", "predicted", "held", "peak", "loaded in", "decode", "64 tokens at once")
    rows = [
        (
            form,
            *(f"{one[key] / 2**20:.1f} MiB" for key in ("predicted", "held", "peak")),
            f"{speeds[form]['seconds']:.1f} s",
            *(f"{speeds[form][key]:.1f} tokens/s" for key in ("decode", "forward")),
        )
        for form, one in sizes.items()
    ]
    return Table(head, rows)


def deviation(form: str, one: dict[str, Any]) -> Target:
    """Held against predicted."""
    off = abs(one["held"] / one["predicted"] - 1)
    return Target(
        f"memory of a {form} span against the prediction", off * 100, MOST_DEVIATION, " %"
    )
