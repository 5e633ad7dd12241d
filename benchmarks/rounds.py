"""Taking turns: each variant runs for a moment, round after round, so that all share the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.processes import Child
from benchmarks.report import middle


@dataclass
class Steps:
    """The decode steps of one variant: ms of each, by round, and the tokens of the last round."""

    rounds: list[list[float]] = field(default_factory=list)
    ids: Sequence[int] = ()

    @property
    def median(self) -> float:
        """Median over the rounds of each round's median, ms."""
        return middle(self.rounds)[0]

    @property
    def least(self) -> float:
        """The best round's median, ms."""
        return middle(self.rounds)[1]

    @property
    def all(self) -> list[float]:
        """Every step, ms."""
        return [ms for one in self.rounds for ms in one]


def decode_rounds(workers: Mapping[str, Child], rounds: int, steps: int) -> dict[str, Steps]:
    """Let each worker decode in turn, from the prefix it has."""
    taken = {name: Steps() for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answer = worker.ask(do="decode", steps=steps)
            taken[name].ids = answer["ids"]
            taken[name].rounds.append(gaps_ms(answer["at"]))
    return taken


def prefill_rounds(workers: Mapping[str, Child], rounds: int, tokens: int) -> dict[str, Steps]:
    """Let each worker prefill in turn; ms of each, one a round. All have this prefix afterwards."""
    taken = {name: Steps() for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            taken[name].rounds.append([worker.ask(do="prefill", tokens=tokens)["s"] * 1e3])
    return taken


def gaps_ms(at: Sequence[float]) -> list[float]:
    """Milliseconds between one token and the next."""
    return [(after - before) * 1e3 for before, after in pairwise(at)]


def same_tokens(taken: Mapping[str, Steps]) -> str:
    """A note on whether all variants generated the same tokens."""
    ids = [list(steps.ids) for steps in taken.values()]
    if all(one == ids[0] for one in ids):
        return f"All of them generated the same {len(ids[0])} tokens."
    agree = min(agreement(ids[0], one) for one in ids)
    return f"The tokens differ from the {agree + 1}th on (of {len(ids[0])})."


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens agree from the start."""
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return index
    return len(one)
