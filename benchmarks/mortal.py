"""Real nodes that are killed or asked to leave, and started again, while a client decodes.

``open_mortals`` runs two nodes for each span, so that every one of them can be lost.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import Child, environment, open_child, petalnode

COPIES = 2


@dataclass(frozen=True)
class Mortal:
    """One node."""

    child: Child
    span: str
    invite: str


@dataclass
class Mortals:
    """The nodes by peer id."""

    model: Path
    home: Path
    nodes: dict[str, Mortal] = field(default_factory=dict)
    started: int = 0

    @property
    def invite(self) -> str:
        """Of the node that is there for longest."""
        return next(iter(self.nodes.values())).invite

    @property
    def pids(self) -> dict[str, int]:
        """The process of each node."""
        return {peer: node.child.pid for peer, node in self.nodes.items()}

    def start(self, span: str) -> str:
        """One more node, which is ready on return; its peer id."""
        verb = [*petalnode(), "run", str(self.model), "--json", "--host", "127.0.0.1"]
        verb += ["--blocks", span, "--identity", str(self.home / f"{self.started}.key")]
        verb += ["--join", self.invite] if self.nodes else []
        self.started += 1
        child = Child(verb, environment())
        try:
            heard = child.hear("listening")
            child.hear("ready")
        except RuntimeError:
            child.stop()
            raise
        self.nodes[heard["peer_id"]] = Mortal(child, span, heard["invite"])
        return str(heard["peer_id"])

    def signal(self, peer: str, number: int) -> float:
        """Signal a node; when (``time.monotonic``)."""
        os.kill(self.nodes[peer].child.pid, number)
        return time.monotonic()

    def again(self, peer: str) -> str:
        """In the place of a node that was lost another one, under a new key."""
        node = self.nodes.pop(peer)
        node.child.stop()
        return self.start(node.span)

    def stop(self) -> None:
        """End what still runs."""
        for node in self.nodes.values():
            os.kill(node.child.pid, signal.SIGKILL)
            node.child.stop()


@contextmanager
def open_mortals(model: Path, spans: Sequence[str]) -> Iterator[Mortals]:
    """A swarm in which every span is held by two nodes."""
    with tempfile.TemporaryDirectory(prefix="petalnode-bench-") as home:
        swarm = Mortals(model, Path(home))
        try:
            for span in tuple(spans) * COPIES:
                swarm.start(span)
            yield swarm
        finally:
            swarm.stop()


@contextmanager
def open_survivor(swarm: Mortals) -> Iterator[Child]:
    """A client with a session over the swarm: see ``benchmarks.survivor``."""
    verb = ["-m", "benchmarks.survivor", str(swarm.model), swarm.invite]
    with open_child(verb, environment()) as client:
        client.hear("open")
        yield client


@dataclass
class Text:
    """What a client said while it decoded: when each token came, its ids, and what happened."""

    at: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    happened: list[dict[str, Any]] = field(default_factory=list)

    def listen(self, client: Child, tokens: int | None = None) -> bool:
        """Take in so many tokens, or all to the end; False when it is over."""
        while tokens is None or tokens > 0:
            said = client.hear()
            if said["event"] == "token":
                self.at.append(said["at"])
                self.ids.append(said["id"])
                tokens = None if tokens is None else tokens - 1
            elif said["event"] == "end":
                return False
            else:
                self.happened.append(said)
        return True

    def longest_wait(self, since: float) -> float:
        """Seconds of the longest wait for a token that ended after ``since``, counted from it."""
        waits = zip(self.at, self.at[1:], strict=False)
        return max((end - max(start, since) for start, end in waits if end > since), default=0.0)

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of that name."""
        return [said for said in self.happened if said["event"] == event]
