"""What is promised of real processes on one machine: how soon they start, are missed, stand in."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass

import trio

from benchmarks.processes import DEADLINE_S, Child, environment, open_child, petalnode
from benchmarks.report import Result, Table, Target, figure
from petalnode.events import Swarm
from petalnode.joining import parse_joins
from petalnode.p2p.host import open_host
from petalnode.p2p.identity import new_identity
from petalnode.survey import Survey, open_survey

ROUNDS = 3
MODEL = "demo"
PROMPT = "def main():\n"
LIVE_TOKENS = "200"
QUARTERS = ("0:2", "2:4", "4:6", "6:8")
SIZES = ("3", "2", "4", "2")
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Promise:
    """Something that shall have happened ``limit_s`` seconds after it began."""

    what: str
    limit_s: float
    measure: Callable[[], float]


@dataclass(frozen=True)
class Node:
    """A serving process, and what others reach it by."""

    child: Child
    invite: str
    addr: str


def run(quick: bool) -> Result:
    """Each promise a few times, in turns."""
    samples: dict[str, list[float]] = {promise.what: [] for promise in PROMISES}
    for _ in range(1 if quick else ROUNDS):
        for promise in PROMISES:
            samples[promise.what].append(promise.measure())
    medians = {what: statistics.median(values) for what, values in samples.items()}
    rows = [
        [one.what, *map(figure, (medians[one.what], max(samples[one.what]), one.limit_s))]
        for one in PROMISES
    ]
    return Result(
        "Promises: the bundled model, real processes on one machine",
        tables=[Table(("", "median s", "worst s", "promised s"), rows)],
        targets=[Target(one.what, medians[one.what], one.limit_s, " s") for one in PROMISES],
        notes=[
            "All nodes of a swarm share this machine's cores. Views are asked for every "
            f"{LOOK_EVERY_S * 1e3:.0f} ms. Covering a model is counted from the processes' start."
        ],
        values=samples,
    )


def demo_s() -> float:
    """``petalnode demo`` from start to end: four nodes, a text, one of them killed."""
    started = time.monotonic()
    with open_child([*petalnode(), "demo", "--json"], environment()) as demo:
        demo.hear("done")
        if not demo.ends(DEADLINE_S):
            raise RuntimeError("the demo does not end")
        return time.monotonic() - started


def killed_s() -> float:
    """Four nodes, of which one is killed: until all the others show three."""

    async def measure(nodes: Sequence[Node]) -> float:
        async with AsyncExitStack() as stack:
            surveys = [
                await stack.enter_async_context(open_survey(parse_joins([node.invite]), None))
                for node in nodes[:-1]
            ]
            await all_show(surveys, lambda swarm: len(swarm.peers) == len(nodes))
            killed = trio.current_time()
            os.kill(nodes[-1].child.pid, signal.SIGKILL)
            await all_show(surveys, lambda swarm: len(swarm.peers) == len(nodes) - 1)
            return trio.current_time() - killed

    with ExitStack() as stack:
        nodes = start_all(stack, *(("--blocks", span) for span in QUARTERS))
        return trio.run(measure, nodes)


def stopped_s() -> float:
    """A node that is halted, its connections open: until who is connected to it gives it up."""

    async def measure(node: Node) -> float:
        async with open_host(new_identity(), listen=()) as host:
            lost = trio.Event()
            host.on_disconnect(lambda peer_id: lost.set())
            await host.connect(node.addr)
            halted = trio.current_time()
            os.kill(node.child.pid, signal.SIGSTOP)
            with trio.fail_after(DEADLINE_S):
                await lost.wait()
            return trio.current_time() - halted

    with ExitStack() as stack:
        (node,) = start_all(stack, ("--blocks", "0:1"))
        stack.callback(os.kill, node.child.pid, signal.SIGKILL)  # it heeds nothing less
        return trio.run(measure, node)


def filled_s() -> float:
    """A text whose only tail is killed: until the node that can be spared is ready in its place."""
    with ExitStack() as stack:
        flags = ("--num-blocks", "4"), ("--blocks", "0:4"), ("--blocks", "4:8")
        spare, _, victim = start_all(stack, *flags)
        verb = [*petalnode(), "generate", MODEL, PROMPT, "--json", "--join", spare.invite]
        verb += ["--max-new-tokens", LIVE_TOKENS]
        stack.enter_context(open_child(verb, environment())).hear("token")
        killed = time.monotonic()
        os.kill(victim.child.pid, signal.SIGKILL)
        while spare.child.hear("ready")["blocks"] != [4, 8]:
            pass
        return time.monotonic() - killed


def covered_s() -> float:
    """Nodes that choose at the same moment, so that they may have to choose again."""

    async def wait(node: Node) -> None:
        async with open_survey(parse_joins([node.invite]), None) as survey:
            await all_show([survey], lambda swarm: swarm.covered)

    with ExitStack() as stack:
        first, *others = (("--num-blocks", size) for size in SIZES)
        founder = listening(started(stack, first))
        began = time.monotonic()
        for flags in others:
            started(stack, (*flags, "--join", founder.invite))
        trio.run(wait, founder)
        return time.monotonic() - began


def start_all(stack: ExitStack, first: Sequence[str], *others: Sequence[str]) -> list[Node]:
    """A founder and, all at once, the others, with these flags; every one is ready on return."""
    nodes = [listening(started(stack, first))]
    join = ("--join", nodes[0].invite)
    children = [started(stack, (*flags, *join)) for flags in others]
    nodes += [listening(child) for child in children]
    for node in nodes:
        node.child.hear("ready")
    return nodes


def started(stack: ExitStack, flags: Sequence[str]) -> Child:
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="petalnode-bench-"))
    verb = [*petalnode(), "run", MODEL, "--json", "--host", "127.0.0.1"]
    return stack.enter_context(
        open_child([*verb, "--identity", f"{home}/key", *flags], environment())
    )


def listening(child: Child) -> Node:
    heard = child.hear("listening")
    return Node(child, heard["invite"], heard["addrs"][0])


async def all_show(surveys: Sequence[Survey], is_so: Callable[[Swarm], bool]) -> None:
    """Ask each contact again and again, until it shows a swarm that is so."""

    async def until(survey: Survey) -> None:
        while not is_so(await survey.look()):  # noqa: ASYNC110 - it is not told
            await trio.sleep(LOOK_EVERY_S)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for survey in surveys:
                nursery.start_soon(until, survey)


PROMISES = (
    Promise("`petalnode demo`, from start to end", 30.0, demo_s),
    Promise("a killed node out of every other one's view", 3.0, killed_s),
    Promise("a halted process is noticed", 10.0, stopped_s),
    Promise("a hole is filled by a node that can be spared", 15.0, filled_s),
    Promise("nodes of uneven sizes that start at once cover the model", 15.0, covered_s),
)
