"""The blocks alone: ``benchmarks/blocks.py``, one process, against transformers.

Only the tiny model: the other one takes minutes, and the section ``large`` has its figures.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.machine import ROOT
from benchmarks.processes import environment
from benchmarks.report import Result


def run(quick: bool) -> Result:
    """Run it as a process of its own, and keep what it prints."""
    flags = ["--only", "tiny", *(["--quick"] if quick else [])]
    verb = [sys.executable, "benchmarks/blocks.py", *flags]
    ran = subprocess.run(
        verb, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return Result(
        "Blocks: CPU time in one process, no network",
        notes=["```text", ran.stdout.rstrip(), "```"],
        values={"lines": ran.stdout.splitlines()},
    )
