"""A quarter of a sharded 2 GB checkpoint, from a directory and from a hub on loopback."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.loading import BLOCKS, sharded_checkpoint
from benchmarks.processes import environment, open_child
from benchmarks.report import Result, Table, Target, figure

SPAN = (BLOCKS // 4, BLOCKS // 2)
PEAK_LIMIT = 1.2
HUB = "tests/models/hub_server.py"
NAME = "bench/two-gigabytes"


def run(quick: bool) -> Result:
    """Load it in a fresh process each time: as it is, fetched, and from the hub's cache."""
    folder = sharded_checkpoint()
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="petalnode-bench-"))
        hub = stack.enter_context(open_child([HUB, f"{NAME}={folder}"], environment()))
        env = {**environment(), "HF_ENDPOINT": hub.hear()["endpoint"], "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HOME": f"{home}/hf", "XDG_CACHE_HOME": f"{home}/cache"}
        loads = {"a directory": load(str(folder), env), "the hub": load(NAME, env)}
        sent = [one for one in hub.ask(do="log")["sent"] if one["file"].endswith(".safetensors")]
        if not quick:
            loads["the hub's cache"] = load(NAME, env)
            after = [one["file"] for one in hub.ask(do="log")["sent"]]
            assert sum(name.endswith(".safetensors") for name in after) == len(sent)
    return result(loads, whole, sent, folder)


def load(model: str, env: dict[str, str]) -> dict[str, float]:
    """What one process says that has loaded the span."""
    verb = ["-m", "benchmarks.loading", "load", model, *map(str, SPAN)]
    with open_child(verb, env) as child:
        return child.hear()


def result(
    loads: dict[str, dict[str, float]], whole: int, sent: list[dict[str, Any]], folder: Path
) -> Result:
    """Tables and targets."""
    fetched = sum(one["count"] for one in sent)
    rows = [
        [name, *(figure(one[key] / 1e6) for key in ("span", "peak")), ratio(one), figure(one["s"])]
        for name, one in loads.items()
    ]
    shards = len(list(folder.glob("*.safetensors")))
    worst = max(one["peak"] / one["span"] for one in loads.values())
    return Result(
        f"Loading: blocks {SPAN[0]}:{SPAN[1]} of {BLOCKS} from a sharded checkpoint, bfloat16",
        tables=[Table(("loaded from", "span MB", "peak MB", "peak / span", "s"), rows)],
        targets=[Target("peak memory / span, worst", worst, PEAK_LIMIT, " ×")],
        notes=[
            "Peak: the most resident memory while loading (VmHWM), less what was resident before.",
            f"The hub was asked for {len(sent)} of {shards} shards: {figure(fetched / 1e6)} of "
            f"{figure(whole / 1e6)} MB.",
        ],
        values={"peak_ratio": worst, "fetched_bytes": fetched, "whole_bytes": whole},
    )


def ratio(one: dict[str, float]) -> str:
    return f"{one['peak'] / one['span']:.2f}"
