"""How long a text stands still when a hop is killed, beyond the prefill of what was lost."""

from __future__ import annotations

import random
import signal
import statistics
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.links import sent_between, sent_bytes
from benchmarks.mortal import Mortals, Text, open_mortals, open_survivor
from benchmarks.processes import Child, environment, open_child
from benchmarks.report import Result, Table, Target, figure

SPANS = {"246M": ("0:5", "5:11", "11:16"), "tiny": ("0:3", "3:6", "6:8")}
PLACES = ("head", "middle", "tail")
PREFIXES = (128, 1024)
KILLS = 9
TRIES = 3
STEPS, STEPS_BEFORE = 14, 6
MEDIAN_S, WORST_S = 1.0, 2.0
OTHER_LINKS = 0.1
"""Of the bytes of the replay, what any other link may carry while the text recovers."""
NUMBER_BYTES = 4


@dataclass(frozen=True)
class Kill:
    """One kill; times in seconds. ``other``: bytes on the busiest of all other links."""

    prefix: int
    place: str
    wait: float
    prefill: float
    replayed_tokens: int
    replay_bytes: int
    other_bytes: int
    exact: bool

    @property
    def stall(self) -> float:
        return self.wait - self.prefill


def run(quick: bool) -> Result:
    """Kill one hop after the other, at random moments of a seed, each time in a new text."""
    return measure("tiny" if quick else "246M", 3 if quick else KILLS)


def measure(name: str, kills: int) -> Result:
    """So many kills at each prefix."""
    model, rng = checkpoint(name), random.Random(0)
    taken: list[Kill] = []
    with ExitStack() as stack:
        swarm = stack.enter_context(open_mortals(model, SPANS[name]))
        client = stack.enter_context(open_survivor(swarm))
        alone = stack.enter_context(prefiller(model))
        client.tell(do="await", peers=list(swarm.nodes))
        client.hear("there")
        for prefix in PREFIXES:
            client.tell(do="prefill", tokens=prefix)
            client.hear("prefilled")
            usual = undisturbed(client)
            done = 0
            for _ in range(TRIES * kills):
                kill = one_kill(swarm, client, alone, prefix, done % len(PLACES), usual, rng)
                if kill is not None:
                    taken.append(kill)
                    done += 1
                if done == kills:
                    break
            else:
                raise RuntimeError(f"Only {done} of {kills} kills met a hop that was in use.")
    return summary(name, taken)


def prefiller(model: Path) -> AbstractContextManager[Child]:
    """The process that measures the prefill of a span."""
    return open_child(["-m", "benchmarks.span_prefill", str(model)], environment())


def undisturbed(client: Child) -> Text:
    """A text in which nobody dies."""
    text = Text()
    client.tell(do="decode", steps=STEPS)
    text.listen(client)
    return text


def one_kill(
    swarm: Mortals,
    client: Child,
    alone: Child,
    prefix: int,
    place: int,
    usual: Text,
    rng: random.Random,
) -> Kill | None:
    """Kill a hop while it is in use, let the text end, and start a node in its place.

    None if the session had left the hop just before, as it does a slow one.
    """
    victim = hops_of(client)[place]
    start, end = map(int, swarm.nodes[victim].span.split(":"))
    lost = {"blocks": [start, end], "tokens": prefix}
    prefills = [alone.ask(**lost)["s"]]
    processes = swarm.pids | {"client": client.pid}
    step_s = statistics.median(b - a for a, b in zip(usual.at, usual.at[1:], strict=False))
    text = Text()
    client.tell(do="decode", steps=STEPS)
    text.listen(client, STEPS_BEFORE)
    before = sent_bytes()
    trio.run(trio.sleep, rng.random() * step_s)  # at any moment of a step
    killed = swarm.signal(victim, signal.SIGKILL)
    text.listen(client)
    sent = sent_between(before, sent_bytes())
    prefills.append(alone.ask(**lost)["s"])
    recovered = [said for said in text.of("recovered") if said["lost"] == [victim]]
    now = hops_of(client)
    sender = now[place - 1] if place else "client"
    replay, other = replay_and_rest(sent, processes[sender], processes[now[place]])
    client.tell(do="await", peers=[swarm.again(victim)])
    client.hear("there")
    if not recovered and victim not in now:
        return None
    if len(recovered) != 1:
        raise RuntimeError(f"A kill of {victim} led to {text.happened or 'no recovery'}.")
    return Kill(
        prefix=prefix,
        place=PLACES[place],
        wait=text.longest_wait(killed),
        prefill=statistics.mean(prefills),
        replayed_tokens=recovered[0]["replayed_tokens"],
        replay_bytes=replay,
        other_bytes=other,
        exact=text.ids == usual.ids,
    )


def hops_of(client: Child) -> list[str]:
    """The peers of its chain."""
    client.tell(do="hops")
    peers: list[str] = client.hear("hops")["peers"]
    return peers


def replay_and_rest(
    sent: Mapping[tuple[int, int], int], sender: int, receiver: int
) -> tuple[int, int]:
    """Bytes from the sender of the dead hop to its replacement, and on the busiest other link."""
    rest = [count for link, count in sent.items() if link != (sender, receiver)]
    return sent.get((sender, receiver), 0), max(rest, default=0)


def summary(name: str, kills: list[Kill]) -> Result:
    rows: list[list[str]] = []
    targets: list[Target] = []
    values: dict[str, Any] = {}
    for prefix in PREFIXES:
        ours = [kill for kill in kills if kill.prefix == prefix]
        stalls = [kill.stall for kill in ours]
        rows += [row(prefix, p, [kill for kill in ours if kill.place == p]) for p in PLACES]
        share = max(kill.other_bytes / max(1, kill.replay_bytes) for kill in ours)
        least = min(kill.replay_bytes / needed_bytes(name, prefix) for kill in ours)
        median, worst = statistics.median(stalls), max(stalls)
        targets += [
            Target(f"stall at prefix {prefix}, median", median, MEDIAN_S, " s"),
            Target(f"stall at prefix {prefix}, worst", worst, WORST_S, " s"),
            Target(f"replay at prefix {prefix}, least part of the prefix", least, 1.0, "", True),
            Target(f"busiest other link, part of the replay, {prefix}", share, OTHER_LINKS),
        ]
        values |= {f"{prefix}_stalls_s": stalls, f"{prefix}_other_links": share}
    exact = sum(kill.exact for kill in kills)
    targets.append(Target("texts equal to the undisturbed one", exact, len(kills), "", True))
    head = ("prefix, hop killed", "kills", "wait s", "prefill s", "stall s", "worst stall s")
    return Result(
        f"Stall: a hop is killed (SIGKILL), {name} Llama, 3 hops, {len(kills)} kills",
        tables=[Table((*head, "replay kB", "busiest other link kB"), rows)],
        targets=targets,
        notes=[
            "Wait: from the kill to the end of the longest pause in the tokens. Prefill: the lost "
            "span computes the prefix, in one thread of another process, nothing sent; the mean of "
            "once just before the kill and once after. Stall: wait minus prefill. kB are 10³ bytes "
            "over TCP, by the kernel's count (ss), from the kill to the end of the text, "
            f"{STEPS - STEPS_BEFORE} tokens: the replay's link is the one from the sender of the "
            "dead hop to the replacement, its steps included; the busiest other link is that of "
            "any other two processes. Medians."
        ],
        values=values,
    )


def needed_bytes(name: str, prefix: int) -> int:
    """The hidden states of a prefix."""
    return prefix * SHAPES[name]["hidden_size"] * NUMBER_BYTES


def row(prefix: int, place: str, kills: list[Kill]) -> list[str]:
    def median(what: str) -> float:
        return float(statistics.median(getattr(kill, what) for kill in kills))

    seconds = [median("wait"), median("prefill"), median("stall"), max(k.stall for k in kills)]
    sent = [median("replay_bytes") / 1e3, median("other_bytes") / 1e3]
    return [f"{prefix}, {place}", str(len(kills)), *map(figure, seconds + sent)]
