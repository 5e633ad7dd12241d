"""The processes of a benchmark. All speak JSON objects, one a line; each has one thread for torch.

``open_swarm`` runs real ``petalnode run`` nodes on loopback, ``open_worker`` a client or a local
engine (``benchmarks.worker``), ``open_relay`` a long cable (``benchmarks.relay``).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

from benchmarks.machine import ROOT

DEADLINE_S = 120.0
"""For one answer of a child; then it is killed and the benchmark fails."""
STOP_DEADLINE_S = 5.0


class Child:
    """A process that answers in JSON lines."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = " ".join(arguments)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(env),
            cwd=ROOT,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, **message: Any) -> None:
        """Say something without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def hear(self, event: str | None = None) -> dict[str, Any]:
        """The next thing it says, or the next of that ``event``."""
        assert self._process.stdout is not None
        watchdog = Timer(DEADLINE_S, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                said: dict[str, Any] = json.loads(line)
                if event is None or said["event"] == event:
                    return said
        finally:
            watchdog.cancel()
        raise RuntimeError(f"a process of the benchmark ended or was silent: {self.name}")

    def ask(self, **message: Any) -> dict[str, Any]:
        """Say something and return the answer."""
        self.tell(**message)
        return self.hear()

    def ends(self, deadline_s: float) -> bool:
        """Whether it ends by itself in time."""
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Ask it to end; kill it if it does not soon."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@dataclass(frozen=True)
class Swarm:
    """Running nodes and what a client needs to join them."""

    model: Path
    invite: str
    nodes: Sequence[Child]
    far: bool = False


@contextmanager
def open_child(arguments: Sequence[str], env: Mapping[str, str]) -> Iterator[Child]:
    """Run a process; it is stopped on leaving."""
    child = Child(arguments, env)
    try:
        yield child
    finally:
        child.stop()


@contextmanager
def open_swarm(model: Path, spans: Sequence[str], *, delay_s: float = 0.0) -> Iterator[Swarm]:
    """Nodes with these spans (``"0:4"``), each in a process; all are ready when the body starts.

    With ``delay_s`` each node is reached through a relay that holds back every byte for so long.
    """
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="petalnode-bench-"))
        nodes: list[Child] = []
        invite = ""
        for number, span in enumerate(spans):
            flags = ["--blocks", span, "--identity", f"{home}/{number}.key"]
            flags += ["--join", invite] if invite else []
            flags += relayed(stack, delay_s) if delay_s else []
            verb = [*petalnode(far=bool(delay_s)), "run", str(model), "--json"]
            verb += ["--host", "127.0.0.1", *flags]
            nodes.append(stack.enter_context(open_child(verb, environment())))
            heard = nodes[-1].hear("listening")
            invite = invite or heard["invite"]
        for node in nodes:
            node.hear("ready")
        yield Swarm(model, invite, nodes, bool(delay_s))


def relayed(stack: ExitStack, delay_s: float) -> list[str]:
    """Flags of a node that others reach through a relay of its own."""
    port = free_port()
    relay = stack.enter_context(open_relay(port, delay_s))
    announced = f"/ip4/127.0.0.1/tcp/{relay}"
    return ["--port", str(port), "--announce", announced]


@contextmanager
def open_relay(port: int, delay_s: float) -> Iterator[int]:
    """A relay to a local port; the value is the relay's own port."""
    verb = ["-m", "benchmarks.relay", str(port), str(delay_s)]
    with open_child(verb, environment()) as relay:
        yield int(relay.hear()["port"])


@contextmanager
def open_worker(engine: str, model: Path, swarm: Swarm | None = None) -> Iterator[Child]:
    """A worker process, not yet asked whether it is ready: see ``benchmarks.worker``."""
    verb = ["-m", "benchmarks.worker", engine, str(model)]
    if swarm is not None:
        verb += ["--join", swarm.invite, *(["--far"] if swarm.far else [])]
    with open_child(verb, environment()) as worker:
        yield worker


def petalnode(*, far: bool = False) -> list[str]:
    """The command line; a far node uses announced addresses only (``benchmarks.far``)."""
    return ["-m", "benchmarks.far" if far else "petalnode"]


@cache
def environment() -> Mapping[str, str]:
    """One thread a process, and nothing of the user's own petalnode settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PETALNODE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
