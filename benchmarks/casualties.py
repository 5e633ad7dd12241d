"""Real nodes that are killed and started again, for ``benchmarks.kills`` and ``benchmarks.soak``.

Every span of the bundled model is held by two processes; a node that comes back keeps its place and
its identity. Clients are nodes of this process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import trio

from benchmarks.machine import ROOT
from benchmarks.processes import environment

SPANS = ("0:3", "3:6", "6:8")
COPIES = 2
KV_TOKENS = 8192
READY_DEADLINE_S = 90.0
STOP_DEADLINE_S = 20.0
PROMPT_TOKENS = (6, 40, 150, 400)
MODEL = ROOT / "node" / "demo"


@dataclass(eq=False)
class Casualty:
    """One node: its place, and its process where it lives."""

    span: str
    key: Path
    process: trio.Process | None = None
    peer_id: str = ""
    invite: str = ""
    is_ready: bool = False
    deaths: int = 0
    said: dict[str, dict[str, Any]] = field(default_factory=dict)


class Ward:
    """The nodes. Made by ``open_ward``. ``log`` is told what happens to them."""

    def __init__(
        self,
        folder: Path,
        nursery: trio.Nursery,
        log: Callable[[str], None],
        arguments: Sequence[str],
    ) -> None:
        self._arguments = arguments
        self.nodes = [
            Casualty(span, folder / f"{number}.key") for number, span in enumerate(SPANS * COPIES)
        ]
        self._nursery = nursery
        self._log = log
        self._changed = trio.Event()

    @property
    def invite(self) -> str:
        """Of a node that is ready."""
        return next(node.invite for node in self.nodes if node.is_ready)

    def by_peer(self, peer_id: str) -> Casualty:
        """The node with that peer id."""
        return next(node for node in self.nodes if node.peer_id == peer_id)

    def may_die(self, victims: Sequence[Casualty]) -> bool:
        """Whether every span is still held by somebody without them."""
        left = {node.span for node in self.nodes if node.is_ready and node not in victims}
        return left == set(SPANS)

    def kill(self, node: Casualty) -> None:
        """SIGKILL, and start it again in a while."""
        assert node.process is not None
        node.is_ready = False
        node.deaths += 1
        node.process.kill()
        self._nursery.start_soon(self._bring_back, node)

    async def start_all(self) -> None:
        """The first founds the swarm, the others join it; returns when all are ready."""
        first, *others = self.nodes
        await self.start(first)
        async with trio.open_nursery() as nursery:
            for node in others:
                nursery.start_soon(self.start, node)

    async def start(self, node: Casualty) -> None:
        """Returns when it is ready. Raises TooSlowError."""
        known = [other.invite for other in self.nodes if other.is_ready and other is not node]
        verb = [sys.executable, "-m", "petalnode", "run", "demo", "--json", "--blocks", node.span]
        verb += ["--host", "127.0.0.1", "--identity", str(node.key)]
        verb += [
            *self._arguments,
            "--kv-tokens",
            str(KV_TOKENS),
            *(word for invite in known for word in ("--join", invite)),
        ]
        node.said = {}
        node.process = await trio.lowlevel.open_process(
            verb, stdout=subprocess.PIPE, env=dict(environment()), start_new_session=True
        )
        self._nursery.start_soon(self._follow, node, node.process)
        with trio.fail_after(READY_DEADLINE_S):
            while not node.is_ready:
                await self._changed.wait()

    async def all_ready(self) -> None:
        """Until everybody is back."""
        with trio.fail_after(2 * READY_DEADLINE_S):
            while not all(node.is_ready for node in self.nodes):
                await self._changed.wait()

    async def stop_all(self) -> list[str]:
        """Ask every node to leave; what was wrong with that."""
        wrong: list[str] = []
        for node in self.nodes:
            if node.process is not None:
                node.process.send_signal(signal.SIGTERM)
        for node in self.nodes:
            if node.process is None:
                continue
            with trio.move_on_after(STOP_DEADLINE_S) as deadline:
                code = await node.process.wait()
            if deadline.cancelled_caught:
                node.process.kill()
                wrong.append(f"{node.span} did not leave within {STOP_DEADLINE_S:.0f} s")
            elif code != 0:
                wrong.append(f"{node.span} left with exit code {code}")
        return wrong

    async def _bring_back(self, node: Casualty) -> None:
        assert node.process is not None
        await node.process.wait()
        await self.start(node)

    async def _follow(self, node: Casualty, process: trio.Process) -> None:
        """Read one process's events to their end."""
        assert process.stdout is not None
        pending = b""
        async for chunk in process.stdout:
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._take(node, json.loads(line))

    def _take(self, node: Casualty, event: dict[str, Any]) -> None:
        node.said[event["event"]] = event
        if event["event"] == "listening":
            node.peer_id, node.invite = event["peer_id"], event["invite"]
        if event["event"] == "ready":
            node.is_ready = True
            self._log(f"{node.span} {node.peer_id[-6:]} is ready")
            changed, self._changed = self._changed, trio.Event()
            changed.set()


@asynccontextmanager
async def open_ward(
    log: Callable[[str], None], arguments: Sequence[str] = ()
) -> AsyncIterator[Ward]:
    """The nodes, all ready, with these arguments for each; whatever lives is killed on leaving."""
    with TemporaryDirectory(prefix="petalnode-bench-") as folder:
        async with trio.open_nursery() as nursery:
            ward = Ward(Path(folder), nursery, log, arguments)
            try:
                await ward.start_all()
                yield ward
            finally:
                for node in ward.nodes:
                    if node.process is not None:
                        node.process.kill()
                nursery.cancel_scope.cancel()


def prompt(number: int) -> list[int]:
    """Token ids of one of ``len(PROMPT_TOKENS)`` prompts."""
    return [(31 * n + 7 * n * number + number) % 1000 + 10 for n in range(PROMPT_TOKENS[number])]


def local_tokens(new_tokens: int) -> list[list[int]]:
    """What ``transformers`` makes of every prompt, greedily and in float32; end tokens count."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    result = []
    for number in range(len(PROMPT_TOKENS)):
        ids = torch.tensor([prompt(number)])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        result.append(output[0, ids.shape[1] :].tolist())
    return result


def progress(text: str) -> None:
    """A line on stderr, with the time of day."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
