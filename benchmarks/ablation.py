"""What failures cost three ways to generate: with restarts, without caches, and ours.

    python -m benchmarks.ablation MODEL SPAN …        obeys lines on stdin, one JSON object each

{"how": "ours" | "plain" | "restart" | "cacheless", "prefix": n, "steps": n, "rate": p, "seed": n}
    → {"s": …, "failures": …, "ids": […]}, a text of so many new tokens
{"how": "pair", "prefix": n, "steps": n} → {"ours": […], "plain": […]}, s of each step, in turns

One process: real blocks, hop servers and chains over streams in memory (`benchmarks.memory_peers`),
each span held by two servers. Of every 1/p steps that are computed exactly one, drawn by the seed,
is preceded by a failure of a hop of the chain, drawn too. The hops behind ``plain`` and ``restart``
keep no replay logs; ``cacheless`` feeds the whole sequence at each step.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio

from benchmarks.engines import prompt
from benchmarks.memory_peers import CLIENT, MemoryPeers
from petalnode.compute import Compute, ComputeThread
from petalnode.errors import PeerError
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.client import ClientParts
from petalnode.models.loading import load_client
from petalnode.session.chain import ChainSetup, open_chain
from petalnode.session.session import GenerateOptions, IdsSource, Session

COPIES = 2


class Failures:
    """Which steps are preceded by a failure, and of which hop."""

    def __init__(self, rate: float, seed: int) -> None:
        self.happened = 0
        self._rng = random.Random(seed)
        self._due = self._draw(round(1 / rate)) if rate else iter(())
        self._next = next(self._due, None)
        self._step = 0

    def _draw(self, period: int) -> Iterator[int]:
        start = 0
        while True:
            yield start + self._rng.randrange(period)
            start += period

    def before_step(self, peers: MemoryPeers, session: Session) -> bool:
        """Let a hop of the session fail if it is time; whether it was."""
        due = self._step == self._next
        if due:
            peers.fail(self._rng.choice(session.chain.hops).peer_id)
            self.happened += 1
            self._next = next(self._due, None)
        self._step += 1
        return due


@dataclass
class Bench:
    """Both kinds of swarm, and the client's parts."""

    checkpoint: Checkpoint
    with_logs: MemoryPeers
    without: MemoryPeers
    client: ClientParts
    compute: Compute

    @asynccontextmanager
    async def session(self, *, ours: bool) -> AsyncIterator[tuple[MemoryPeers, Session]]:
        """A new session over hops that have nothing yet."""
        config = self.checkpoint.config
        peers = self.with_logs if ours else self.without
        source = IdsSource(self.client, self.compute)
        setup = ChainSetup(
            opener=peers,
            client=CLIENT,
            fingerprint=self.checkpoint.fingerprint,
            hidden_size=config.hidden_size,
            source=source,
            replacements=peers if ours else None,
        )
        async with open_chain(setup, peers.hops(0, config.num_blocks)) as chain:
            yield peers, Session(chain, source, self.checkpoint.tokenizer(), self.compute)


async def cached(
    bench: Bench, how: str, prefix: list[int], steps: int, failures: Failures
) -> tuple[float, list[int]]:
    """Seconds after the first prefill, and the tokens. A text that breaks is begun again."""
    began: float | None = None
    while True:
        async with bench.session(ours=how == "ours") as (peers, session):
            await session.logits(prefix[:-1], last=1)
            began = began or time.monotonic()
            generation = session.generate(prefix[-1:], GenerateOptions(steps))
            try:
                for _ in range(steps):
                    failures.before_step(peers, session)
                    await anext(generation)
            except PeerError:
                continue
            return time.monotonic() - began, generation.tokens


async def cacheless(
    bench: Bench, prefix: list[int], steps: int, failures: Failures
) -> tuple[float, list[int]]:
    """The same, every step from the first token on; a step that breaks is made again."""
    ids, began = list(prefix), time.monotonic()
    while len(ids) < len(prefix) + steps:
        async with bench.session(ours=False) as (peers, session):
            try:
                while len(ids) < len(prefix) + steps:
                    failures.before_step(peers, session)
                    session.rollback(0)
                    logits = await session.logits(ids, last=1)
                    ids.append(int(logits[-1].argmax()))
            except PeerError:
                continue
    return time.monotonic() - began, ids[len(prefix) :]


async def in_turns(bench: Bench, prefix: list[int], steps: int) -> dict[str, list[float]]:
    """A step with replay logs, one without, and so on; seconds of each."""
    taken: dict[str, list[float]] = {"ours": [], "plain": []}
    async with bench.session(ours=True) as (_, ours), bench.session(ours=False) as (_, plain):
        ways = [("ours", ours.generate(prefix, GenerateOptions(steps + 1)))]
        ways.append(("plain", plain.generate(prefix, GenerateOptions(steps + 1))))
        for _, generation in ways:
            await anext(generation)
        for _ in range(steps):
            for how, generation in ways:
                began = time.perf_counter()
                await anext(generation)
                taken[how].append(time.perf_counter() - began)
            ways.reverse()  # neither always comes second
    return taken


async def obey(bench: Bench, failures: dict[str, Failures], order: dict[str, Any]) -> Any:
    """One text. The failures of a kind of run go on from text to text."""
    prefix = prompt(order["prefix"], bench.checkpoint.config.vocab_size)
    if order["how"] == "pair":
        return await in_turns(bench, prefix, order["steps"])
    key = json.dumps([order[name] for name in ("how", "prefix", "rate", "seed")])
    drawn = failures.setdefault(key, Failures(order["rate"], order["seed"]))
    before = drawn.happened
    if order["how"] == "cacheless":
        seconds, ids = await cacheless(bench, prefix, order["steps"], drawn)
    else:
        seconds, ids = await cached(bench, order["how"], prefix, order["steps"], drawn)
    return {"s": seconds, "failures": drawn.happened - before, "ids": ids}


async def work(model: str, spans: list[str]) -> None:
    """Until stdin ends."""
    checkpoint = open_checkpoint(model)
    failures: dict[str, Failures] = {}
    async with trio.open_nursery() as nursery:
        with_logs = MemoryPeers(checkpoint, nursery, logs=True)
        without = MemoryPeers(checkpoint, nursery, logs=False)
        for span in spans * COPIES:
            start, end = map(int, span.split(":"))
            with_logs.add((start, end))
            without.add((start, end))
        client = load_client(checkpoint, dtype=torch.float32)
        bench = Bench(checkpoint, with_logs, without, client, ComputeThread())
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps(await obey(bench, failures, json.loads(line))), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its processes itself
    trio.run(work, sys.argv[1], sys.argv[2:])
