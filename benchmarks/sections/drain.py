"""How late a token comes when a node in use is told to stop, and its sessions move away."""

from __future__ import annotations

import signal
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.checkpoints import checkpoint
from benchmarks.mortal import Mortals, Text, open_mortals, open_survivor
from benchmarks.processes import Child
from benchmarks.report import Result, Table, Target, figure
from benchmarks.sections.stall import PLACES, SPANS

PREFIX = 1024
STEPS, STEPS_BEFORE = {"246M": 160, "tiny": 400}, 40
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TIMES_NORMAL, PLUS_MS = 1.5, 300.0
LEAVE_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Drained:
    """One node that was told to stop; times in ms.

    ``moved``: from the signal to the first token that did not come through it, None if all did.
    ``left``: whether its process then ended by itself.
    """

    place: str
    signal: str
    normal: float
    longest: float
    moved: float | None
    left: bool
    exact: bool


def run(quick: bool) -> Result:
    """Stop each hop of the chain, by either signal."""
    if quick:
        return measure("tiny", len(PLACES))
    return measure("246M", len(PLACES) * len(SIGNALS))


def measure(name: str, drains: int) -> Result:
    """Stop so many nodes, one after the other, each in a new text."""
    drained: list[Drained] = []
    with ExitStack() as stack:
        swarm = stack.enter_context(open_mortals(checkpoint(name), SPANS[name]))
        client = stack.enter_context(open_survivor(swarm))
        client.tell(do="await", peers=list(swarm.nodes))
        client.hear("there")
        client.tell(do="prefill", tokens=PREFIX)
        client.hear("prefilled")
        usual = Text()
        client.tell(do="decode", steps=STEPS[name])
        usual.listen(client)
        for number in range(drains):
            place, stop = number % len(PLACES), SIGNALS[number % len(SIGNALS)]
            drained.append(one_drain(swarm, client, place, stop, usual))
    return summary(name, drained)


def one_drain(
    swarm: Mortals, client: Child, place: int, stop: signal.Signals, usual: Text
) -> Drained:
    """Tell a hop to stop while it is in use; then start a node in its place."""
    client.tell(do="hops")
    leaver = client.hear("hops")["peers"][place]
    text = Text()
    client.tell(do="decode", steps=len(usual.ids))
    text.listen(client, STEPS_BEFORE)
    told = swarm.signal(leaver, stop)
    text.listen(client)
    chains = [said["at"] for said in text.of("chain") if leaver not in said["peers"]]
    died = any(leaver in said["lost"] for said in text.of("recovered"))
    left = bool(chains) and not died and swarm.nodes[leaver].child.ends(LEAVE_DEADLINE_S)
    client.tell(do="await", peers=[swarm.again(leaver)])
    client.hear("there")
    return Drained(
        place=PLACES[place],
        signal=stop.name,
        normal=statistics.median(b - a for a, b in pairwise(text.at[:STEPS_BEFORE])) * 1e3,
        longest=text.longest_wait(told) * 1e3,
        moved=(chains[0] - told) * 1e3 if chains else None,
        left=left,
        exact=text.ids == usual.ids,
    )


def summary(name: str, drained: list[Drained]) -> Result:
    rows = [
        [
            f"{one.place}, {one.signal}",
            figure(one.normal),
            figure(one.longest),
            figure(TIMES_NORMAL * one.normal + PLUS_MS),
            "never" if one.moved is None else figure(one.moved),
            "yes" if one.left else "no",
        ]
        for one in drained
    ]
    over = max(drained, key=lambda one: one.longest - TIMES_NORMAL * one.normal)
    limit = TIMES_NORMAL * over.normal + PLUS_MS
    left = sum(one.left for one in drained)
    exact = sum(one.exact for one in drained)
    head = ("hop, signal", "normal ms", "longest ms", "limit ms", "moved after ms", "then ended")
    return Result(
        f"Drain: a node in use is told to stop, {name} Llama, 3 hops, prefix {PREFIX}",
        tables=[Table(head, rows)],
        targets=[
            Target("longest wait for a token", over.longest, limit, " ms"),
            Target(
                "nodes that were left, and then ended by themselves", left, len(drained), "", True
            ),
            Target("texts equal to the undisturbed one", exact, len(drained), "", True),
        ],
        notes=[
            f"The limit is {TIMES_NORMAL} × the normal interval, the median of the "
            f"{STEPS_BEFORE} tokens before the signal in the same text, plus {PLUS_MS:.0f} ms. The "
            "longest interval is that of any token after the signal, to the end of the text."
        ],
        values={"longest_ms": [one.longest for one in drained]},
    )
