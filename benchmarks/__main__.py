"""Measure what petalnode takes, beside local transformers with the same threads.

    python -m benchmarks [SECTION …] [--quick] [--json] [--out FILE]

Variants take turns and medians over the rounds are shown, so that a busy machine weighs on all
alike. Every process has one thread for torch. ``--out`` writes the report as Markdown; nothing else
is written but the models, once, under $XDG_CACHE_HOME/petalnode/bench.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.report import Result
from benchmarks.sections import ALL, CHECKS, QUICK

KNOWN = (*ALL, *CHECKS)


def main() -> int:
    """Run the sections; 0 whatever they show, so that a missed target is a figure, no failure."""
    arguments = parse()
    head = describe()
    if not arguments.json:
        print("\n".join(f"- {line}" for line in head), end="\n\n", flush=True)
    results = []
    for name in arguments.sections or (QUICK if arguments.quick else ALL):
        results.append(timed(name, arguments.quick))
        result = results[-1]
        text = json.dumps(result.to_json()) if arguments.json else result.markdown()
        print(text, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(report(head, results, arguments.quick))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(KNOWN))
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and sections, two minutes"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a section")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as Markdown")
    arguments = parser.parse_args()
    for name in arguments.sections:
        if name not in KNOWN:
            parser.error(f"there is no section {name!r}; there are {', '.join(KNOWN)}")
    return arguments


def timed(name: str, quick: bool) -> Result:
    """Run one section."""
    section = importlib.import_module(f"benchmarks.sections.{name}")
    started = time.monotonic()
    result: Result = section.run(quick)
    result.took_s = time.monotonic() - started
    return result


def report(head: list[str], results: list[Result], quick: bool) -> str:
    """The whole report."""
    took = sum(result.took_s for result in results)
    command = f"python -m benchmarks{' --quick' if quick else ''}"
    missed = [target for result in results for target in result.targets if not target.reached]
    targets = sum(len(result.targets) for result in results)
    lines = [
        "# Benchmarks",
        "",
        f"Made by `{command}` in {took:.0f} s; do not edit. {targets - len(missed)} of {targets} "
        "targets reached.",
        "",
        *(f"- {line}" for line in head),
        "",
        "Medians over rounds in which the variants take turns; every process has one thread.",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join(result.markdown() for result in results)


if __name__ == "__main__":
    sys.exit(main())
