"""One engine in a process of its own, told what to do on stdin, answering on stdout.

python -m benchmarks.worker transformers|blocks|swarm MODEL [--join INVITE] [--far]

{"do": "ready"}                                → {"rtts_ms": […]}, once it is
{"do": "prefill", "tokens": n}                 → {"s": …}
{"do": "decode", "steps": n}                   → {"at": […], "ids": […]}
{"do": "flood", "tokens": n, "seconds": s}     → {"prefills": …}, prefill after prefill
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import trio

from benchmarks.engines import Blocks, Engine, OverSwarm, Transformers
from benchmarks.far import use_announced_only
from petalnode.events import Event, Route
from petalnode.node import NodeOptions, open_node

LOCAL: dict[str, Callable[[Path], Engine]] = {"transformers": Transformers, "blocks": Blocks}


@asynccontextmanager
async def open_engine(arguments: argparse.Namespace, route: list[Event]) -> AsyncIterator[Engine]:
    """The engine that was asked for; a swarm's route is noted."""
    if arguments.engine in LOCAL:
        yield LOCAL[arguments.engine](Path(arguments.model))
        return
    options = NodeOptions(join=(arguments.join,))
    async with (
        open_node(arguments.model, options) as node,
        node.open_session(route.append) as session,
    ):
        yield OverSwarm(session, node.checkpoint.config.vocab_size)


async def obey(engine: Engine, route: list[Event], order: dict[str, Any]) -> dict[str, Any]:
    """Do one thing and say how it went."""
    if order["do"] == "prefill":
        return {"s": await engine.prefill(order["tokens"])}
    if order["do"] == "decode":
        return asdict(await engine.decode(order["steps"]))
    if order["do"] == "flood":
        until, prefills = time.monotonic() + order["seconds"], 0
        while time.monotonic() < until:
            await engine.prefill(order["tokens"])
            prefills += 1
        return {"prefills": prefills}
    hops = [hop for event in route if isinstance(event, Route) for hop in event.hops]
    return {"rtts_ms": [hop.rtt_ms for hop in hops]}


async def work(arguments: argparse.Namespace) -> None:
    """Until stdin ends."""
    route: list[Event] = []
    async with open_engine(arguments, route) as engine:
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps(await obey(engine, route, json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=(*LOCAL, "swarm"))
    parser.add_argument("model")
    parser.add_argument("--join")
    parser.add_argument("--far", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.far:
        use_announced_only()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its processes itself
    trio.run(work, arguments)


if __name__ == "__main__":
    main()
