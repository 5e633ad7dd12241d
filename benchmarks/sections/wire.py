"""The encrypted stream: ``benchmarks/wire.py`` beside raw TCP and stock py-libp2p."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.processes import environment
from benchmarks.report import Result, Table, Target, figure

SIZES = ("16 KiB", "1 MiB", "32 MiB")
SHOWN = {"raw": "raw trio TCP", "stock": "stock py-libp2p", "ours": "petalnode"}
TO_RAW, TO_STOCK, OF_LINK = 0.07, 0.6, 0.9


def run(quick: bool) -> Result:
    """Run it as a process of its own, and read its JSON."""
    verb = [sys.executable, "benchmarks/wire.py", "--json", *(["--quick"] if quick else [])]
    ran = subprocess.run(verb, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=True)
    return summary(json.loads(ran.stdout))


def summary(values: dict[str, Any]) -> Result:
    rates = {name: [values[f"{name}_mb_s_{size}"] for size in SIZES] for name in SHOWN}
    echoes = {name: values[f"{name}_echo_16_KiB_ms"] for name in SHOWN}
    rows = [
        [SHOWN[name], *(figure(rate) for rate in rates[name]), f"{echoes[name]:.3f}"]
        for name in SHOWN
    ]
    head = ("MB/s, one stream", *(f"{size} frames" for size in SIZES), "16 KiB echo, ms")
    to_raw = rates["ours"][1] / rates["raw"][1]
    return Result(
        "Wire: encrypted streams between two processes",
        tables=[Table(head, rows), beside(values)],
        targets=[
            Target("1 MiB frames, of raw TCP", to_raw, TO_RAW, " ×", at_least=True),
            Target("16 KiB echo, of stock", echoes["ours"] / echoes["stock"], TO_STOCK, " ×"),
            Target(
                "of a 100 Mbit/s link at 100 ms round trip",
                values["wan_share_of_link"],
                OF_LINK,
                at_least=True,
            ),
        ],
        notes=[
            f"Over that link: {figure(values['wan_mb_s'])} MB/s (raw TCP "
            f"{figure(values['wan_raw_mb_s'])}); dial {values['wan_dial_s']:.2f} s there, "
            f"{figure(values['dial_ms'])} ms on loopback."
        ],
        values=values,
    )


def beside(values: dict[str, Any]) -> Table:
    """A small echo with and without a bulk upload on the same connection."""
    rows = [
        [
            label,
            figure(values[f"decode_{key}_p50_ms"]),
            figure(values[f"decode_{key}_p99_ms"]),
            figure(values[f"wan_decode_{key}_ms"]),
        ]
        for label, key in (("alone", "alone"), ("beside a bulk upload", "beside_bulk"))
    ]
    head = ("4 KiB echo, ms", "p50", "p99", "p50 on the 100 ms link")
    return Table(head, rows)
