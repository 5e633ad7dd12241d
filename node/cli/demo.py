"""``petalnode demo``: nodes as processes on this machine, and one prompt through them.

In mid-sentence the node that serves the middle is killed; another one holds its blocks, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import trio

from petalnode.cli.arguments import parse_arguments
from petalnode.cli.generate import generate
from petalnode.cli.output import note, print_human, reporter
from petalnode.cli.swarm_table import short
from petalnode.errors import PetalnodeError
from petalnode.events import Event, Report, Route, TokenEvent
from petalnode.models.checkpoint import open_checkpoint
from petalnode.nurseries import plain_errors

SPANS = ("0:3", "3:6", "3:6", "6:8")
PROMPT = "def read_file(path):\n    "
# So small a model repeats itself when greedy; with a seed the text is the same each time.
SAMPLING = "--temperature 0.7 --top-p 0.95 --repetition-penalty 1.05 --seed 6"
NEW_TOKENS = "94"
KILL_AFTER_TOKENS = 40
KILLED_HOP = 1
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 4.0

Say = Callable[[str], None]


def main(arguments: Namespace) -> int:
    """Run the demo; it ends by itself."""
    for name in [name for name in os.environ if name.startswith("PETALNODE_")]:
        del os.environ[name]  # they are meant for one node, not for all of these
    signal.signal(signal.SIGTERM, as_ctrl_c)  # stop the nodes on it, too
    trio.run(demo, arguments)
    return 0


def as_ctrl_c(_: int, frame: FrameType | None) -> None:
    """Do what SIGINT does: while trio runs, its handler keeps the interrupt out of its insides."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # a shell starts its background jobs with it ignored
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


async def demo(arguments: Namespace) -> None:
    """Start the nodes, generate, stop the nodes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # five processes share this machine
    say: Say = silence if arguments.json else note
    prompt = arguments.prompt or PROMPT
    checkpoint = open_checkpoint("demo")
    with tempfile.TemporaryDirectory(prefix="petalnode-demo-") as folder:
        say(f"starting {len(SPANS)} nodes on this machine, each with a part of the model:")
        async with open_processes(Path(folder), say) as nodes:
            verb = ["generate", "--join", nodes[0].invite, *SAMPLING.split()]
            verb += ["--max-new-tokens", NEW_TOKENS, "--", "demo", prompt]
            wanted = parse_arguments(verb)
            say("asking them to go on from a prompt:")
            report = reporter(True) if arguments.json else after_route(prompt)
            await generate(checkpoint, wanted, killing(nodes, say, report))
        say("the nodes have stopped. Next: petalnode run MODEL, petalnode generate MODEL PROMPT")


def silence(text: str) -> None:
    """A ``Say`` for --json."""


def after_route(prompt: str) -> Report:
    """Reports for a person, with the prompt shown in front of the text."""
    routes = count()

    def report(event: Event) -> None:
        if not isinstance(event, Route):
            print_human(event)
        elif next(routes) == 0:  # what a later one is for, has been said
            print_human(event)
            print(f"\n{prompt}", end="", flush=True)

    return report


def killing(nodes: list[ServingProcess], say: Say, report: Report) -> Report:
    """``report``, and in mid-sentence a node that serves the text is killed."""
    serving: list[str] = []
    tokens = count(1)

    def report_and_kill(event: Event) -> None:
        report(event)
        if isinstance(event, Route):
            serving[:] = [hop.peer_id for hop in event.hops]
        elif isinstance(event, TokenEvent) and next(tokens) == KILL_AFTER_TOKENS:
            for node in nodes:
                if node.peer_id in serving[KILLED_HOP : KILLED_HOP + 1]:
                    say(f"\n  [killing {short(node.peer_id)} now]")
                    node.process.kill()

    return report_and_kill


@dataclass
class ServingProcess:
    """One ``petalnode run demo`` in a process of its own, and what it has said."""

    process: trio.Process
    invite: str = ""
    peer_id: str = ""
    listening: trio.Event = field(default_factory=trio.Event)
    ready: trio.Event = field(default_factory=trio.Event)

    async def follow(self, say: Say) -> None:
        """Read its events until it ends."""
        assert self.process.stdout is not None
        pending = b""
        async for chunk in self.process.stdout:
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._take(json.loads(line), say)
        if not self.ready.is_set():
            raise PetalnodeError(
                f"A node of the demo ended with exit code {await self.process.wait()}.",
                "Run `petalnode run demo` by hand to see why.",
            )

    def _take(self, event: dict[str, Any], say: Say) -> None:
        if event["event"] == "listening":
            self.invite, self.peer_id = event["invite"], event["peer_id"]
            self.listening.set()
        elif event["event"] == "ready":
            first, end = event["blocks"]
            say(f"  {short(event['peer_id'])} serves blocks {first}:{end}")
            self.ready.set()


@asynccontextmanager
async def open_processes(folder: Path, say: Say) -> AsyncIterator[list[ServingProcess]]:
    """The serving processes, all ready. They are stopped on leaving."""
    nodes: list[ServingProcess] = []
    with plain_errors():
        async with trio.open_nursery() as nursery:
            try:
                with trio.move_on_after(START_DEADLINE_S) as deadline:
                    await start_all(nursery, nodes, folder, say)
                if deadline.cancelled_caught:
                    raise PetalnodeError(
                        f"The nodes were not ready within {START_DEADLINE_S:.0f} s.",
                        "This machine may be busy: try again.",
                    )
                yield nodes
            finally:
                nursery.cancel_scope.cancel()  # how they end from now on is no news
                with trio.CancelScope(shield=True):
                    await stop_all(nodes)


async def start_all(
    nursery: trio.Nursery, nodes: list[ServingProcess], folder: Path, say: Say
) -> None:
    """The first founds the swarm, the others join it by its invite."""
    for number, blocks in enumerate(SPANS):
        identity = folder / f"identity-{number}.key"
        join = ["--join", nodes[0].invite] if nodes else []
        verb = [sys.executable, "-m", "petalnode", "run", "demo", "--json"]
        where = ["--host", "127.0.0.1", "--blocks", blocks, "--name", f"demo-{number + 1}"]
        await start_one([*verb, *where, "--identity", str(identity), *join], nodes)
        nursery.start_soon(nodes[-1].follow, say)
        await nodes[0].listening.wait()
    for node in nodes:
        await node.ready.wait()


@trio.lowlevel.enable_ki_protection
async def start_one(command: list[str], nodes: list[ServingProcess]) -> None:
    """Add a process to ``nodes``. No interrupt comes between its start and its being known."""
    process = await trio.lowlevel.open_process(
        command,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C goes to the demo, which stops its nodes itself
    )
    nodes.append(ServingProcess(process))


async def stop_all(nodes: list[ServingProcess]) -> None:
    """Ask each to drain and leave; kill what does not, and all of them on another interrupt."""
    try:
        for node in nodes:
            node.process.terminate()
        with trio.move_on_after(STOP_DEADLINE_S):
            for node in nodes:
                await node.process.wait()
    finally:
        for node in nodes:
            node.process.kill()
    for node in nodes:
        await node.process.wait()
