"""Which peer computes the next stage of a micro-batch: the one through which it ends first. Pure.

A **stage** is a range of blocks that some chain has as one hop; whoever holds all of it is its
replica. Peers differ in speed, as measured here, and in the work that they have from us already. A
micro-batch goes where it would be through all its stages soonest; asked again before each stage,
and only for peers that have room, this hands work to whoever is done first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Stage = tuple[int, int]


@dataclass(frozen=True)
class Offer:
    """A peer that holds blocks ``[start, end)``; a token takes ``block_s`` seconds in each, and a
    visit ``visit_s`` more."""

    peer_id: str
    start: int
    end: int
    block_s: float
    visit_s: float

    def holds(self, stage: Stage) -> bool:
        """Whether it is a replica of the stage."""
        return self.start <= stage[0] and stage[1] <= self.end

    def seconds(self, stage: Stage, tokens: int) -> float:
        """For so many tokens."""
        return self.visit_s + tokens * (stage[1] - stage[0]) * self.block_s


@dataclass(frozen=True)
class Choice:
    """The next stage, and who computes it."""

    offer: Offer
    end: int


def soonest(
    offers: Sequence[Offer],
    stages: Collection[Stage],
    busy_s: Mapping[str, float],
    span: Stage,
    tokens: int,
) -> Choice | None:
    """The first step of the way through ``span`` that ends soonest, None if there is no way.

    ``busy_s``: for how long each peer is busy with what it has from us.
    """
    first, last = span
    best: dict[int, tuple[float, Choice | None]] = {first: (0.0, None)}
    inside = sorted(stage for stage in stages if first <= stage[0] and stage[1] <= last)
    for stage in inside:
        if stage[0] not in best:
            continue
        at_s, begun = best[stage[0]]
        for offer in replicas(offers, stage):
            started_s = max(at_s, busy_s.get(offer.peer_id, 0.0))
            ended_s = started_s + offer.seconds(stage, tokens)
            if stage[1] not in best or ended_s < best[stage[1]][0]:
                best[stage[1]] = ended_s, begun or Choice(offer, stage[1])
    return best[last][1] if last in best else None


def replicas(offers: Iterable[Offer], stage: Stage) -> list[Offer]:
    """Who holds all of the stage."""
    return [offer for offer in offers if offer.holds(stage)]
