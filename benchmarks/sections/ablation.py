"""The paper's ablation (arXiv 2312.08361): failures with restarts, without caches, with ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import Child, environment, open_child
from benchmarks.report import Result, Table, Target, figure

MODEL, SPANS = "tiny", ("0:3", "3:6", "6:8")
PREFIXES = (128, 1024)
RATES = (0.0, 1e-4, 1e-3, 1e-2)
TEXTS, TEXT_STEPS = 8, 125
CACHELESS_TEXTS, CACHELESS_STEPS, CACHELESS_RATE = 2, 4, 0.25
PAIRED_STEPS = 1000
TO_PLAIN, TO_UNDISTURBED = 0.98, 0.6
LABELS = {"restart": "restart from scratch", "cacheless": "cache-less", "ours": "ours"}


@dataclass
class Runs:
    """The texts of one way at one rate."""

    seconds: list[float] = field(default_factory=list)
    failures: int = 0
    ids: list[list[int]] = field(default_factory=list)


Taken = dict[tuple[str, float], Runs]
"""By the way and the rate that was really run."""


def run(quick: bool) -> Result:
    """All ways in turns, text by text, at one prefix after the other."""
    texts = 2 if quick else TEXTS
    arguments = ["-m", "benchmarks.ablation", str(checkpoint(MODEL)), *SPANS]
    with open_child(arguments, environment()) as child:
        taken = {prefix: measure(child, prefix, texts) for prefix in PREFIXES}
        to_plain = {prefix: compare(child, prefix) for prefix in PREFIXES}
    return summary(taken, to_plain, texts)


def forced(how: str, rate: float, texts: int) -> float:
    """The rate that is run for a rate of the table: enough for one failure."""
    if how == "cacheless":
        return CACHELESS_RATE if rate else 0.0
    return max(rate, 1 / (texts * TEXT_STEPS)) if rate else 0.0


def measure(child: Child, prefix: int, texts: int) -> Taken:
    """Every way at every rate that is run; one text before warms up."""
    ways = [("plain", 0.0)]
    for how in ("ours", "restart", "cacheless"):
        rates = dict.fromkeys(forced(how, rate, texts) for rate in RATES)
        ways += [(how, rate) for rate in rates if how != "restart" or rate]
    taken: Taken = {way: Runs() for way in ways}
    one_text(child, "plain", prefix, 0.0, Runs())
    for number in range(texts):
        for how, rate in ways if number % 2 else [*reversed(ways)]:  # neither always comes first
            if how != "cacheless" or number < CACHELESS_TEXTS:
                one_text(child, how, prefix, rate, taken[how, rate])
    return taken


def compare(child: Child, prefix: int) -> float:
    """The speed of ours to that of plain caching, both step by step in turns."""
    seconds = child.ask(how="pair", prefix=prefix, steps=PAIRED_STEPS)
    plain, ours = (statistics.median(seconds[how]) for how in ("plain", "ours"))
    return float(plain / ours)


def one_text(child: Child, how: str, prefix: int, rate: float, runs: Runs) -> None:
    """One more text."""
    steps = CACHELESS_STEPS if how == "cacheless" else TEXT_STEPS
    said = child.ask(how=how, prefix=prefix, steps=steps, rate=rate, seed=prefix)
    runs.seconds.append(said["s"])
    runs.failures += said["failures"]
    runs.ids.append(said["ids"])


def steps_per_s(taken: Taken, how: str, rate: float, texts: int) -> float:
    """A cell of the table. Where more failures were forced, their cost is weighed down."""
    steps = CACHELESS_STEPS if how == "cacheless" else TEXT_STEPS
    calm = taken["plain" if how == "restart" else how, 0.0]
    if not rate:
        return steps / statistics.mean(calm.seconds)
    run_at = forced(how, rate, texts)
    calm_s, disturbed_s = (statistics.mean(runs.seconds) for runs in (calm, taken[how, run_at]))
    return steps / (calm_s + rate / run_at * (disturbed_s - calm_s))


def summary(taken: dict[int, Taken], to_plain: dict[int, float], texts: int) -> Result:
    cells = {
        (how, prefix, rate): steps_per_s(taken[prefix], how, rate, texts)
        for how in LABELS
        for prefix in PREFIXES
        for rate in RATES
    }
    rows = [
        [label, *(figure(cells[how, prefix, rate]) for prefix in PREFIXES for rate in RATES)]
        for how, label in LABELS.items()
    ]
    targets = []
    for prefix in PREFIXES:
        kept = cells["ours", prefix, 1e-2] / cells["ours", prefix, 0.0]
        targets += [
            Target(f"ours at 0 to plain caching, {prefix}", to_plain[prefix], TO_PLAIN, " ×", True),
            Target(f"ours at 1e-2 to ours at 0, {prefix}", kept, TO_UNDISTURBED, " ×", True),
        ]
    equal, total = same_ids(taken)
    targets.append(Target("texts equal to those of plain caching", equal, total, "", True))
    head = ["steps/s, by failures a step", *(f"{p}: {r:g}" for p in PREFIXES for r in RATES)]
    return Result(
        f"Ablation: failures of hops, {MODEL} Llama, 3 hops, prefixes {PREFIXES[0]} and "
        f"{PREFIXES[1]}",
        tables=[Table(head, rows), counts(taken, texts)],
        targets=targets,
        notes=notes(texts),
        values={f"{how}_{prefix}_{rate:g}": cell for (how, prefix, rate), cell in cells.items()},
    )


def counts(taken: dict[int, Taken], texts: int) -> Table:
    """What was really run."""
    rows = []
    for how, label in LABELS.items():
        for rate in RATES[1:]:
            run_at = forced(how, rate, texts)
            failures = [str(taken[prefix][how, run_at].failures) for prefix in PREFIXES]
            share = f"{rate / run_at:g}"
            rows.append([f"{label}, {rate:g}", f"{run_at:g}", *failures, share])
    head = ("", "rate that was run", *(f"failures at {p}" for p in PREFIXES), "weight of each")
    return Table(head, rows, "Failures that really happened")


def same_ids(taken: dict[int, Taken]) -> Sequence[int]:
    """How many texts are, as far as they go, those of plain caching; and of how many."""
    pairs = [
        (ids, runs["plain", 0.0].ids[0])
        for runs in taken.values()
        for one in runs.values()
        for ids in one.ids
    ]
    return sum(ids == usual[: len(ids)] for ids, usual in pairs), len(pairs)


def notes(texts: int) -> list[str]:
    return [
        f"Each way generates {texts} texts of {TEXT_STEPS} tokens at each prefix, in turns; "
        "seconds count from the end of the first prefill. Hops, client and streams are in one "
        "process, so there is no network in it; each hop has the torch thread of its span. A "
        "failure takes a hop of the chain and its streams between two steps, which is seen at "
        "once; one of every 1/p steps fails, drawn by a seed, as does the hop. Another server of "
        "the same blocks is always ready.",
        "Restart: caches but no replay logs; the prompt and all tokens so far are computed again. "
        f"Cache-less: {CACHELESS_TEXTS} texts of {CACHELESS_STEPS} tokens, each a forward of the "
        "whole sequence. Plain caching is that of restart, at 0; for the ratio of ours to it both "
        f"take turns step by step, {PAIRED_STEPS} each, and medians count. Where a rate is too low "
        "to be met in so few steps, more failures were forced, as the second table shows, and what "
        "they cost weighs less: steps / (undisturbed s + weight × (disturbed s − undisturbed s)).",
    ]
