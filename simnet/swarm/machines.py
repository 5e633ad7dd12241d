"""The simulated machines, and the views through which they see one another."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from petalnode.routing.announcement import Announcement, State
from petalnode.routing.capacity import Record, Seating
from petalnode.routing.rebalance import Move, best_moves
from petalnode.simnet.swarm.scenario import Group, Scenario

FINGERPRINT = "5" * 32
VIEWS_A_REGION = 4

Phase = Literal["away", "joining", "online", "draining", "moving"]
"""``moving``: it loads the blocks of its new span."""


class View:
    """What the machines that hear of news at the same time believe.

    ``members`` are those of them that are there. ``seating`` has what placement reads of
    ``records``, so that no choice begins with ten thousand records.
    """

    def __init__(self, region: int, num_blocks: int) -> None:
        self.region = region
        self.members: set[str] = set()
        self.records: dict[str, Announcement] = {}
        self.seating = Seating((), num_blocks)
        self.listed = 0  # moves of the last plan
        self._gone: dict[str, int] = {}  # the last number of those who are not there any more
        self._plans: dict[Collection[str], tuple[Move, ...]] = {}

    def take(self, record: Announcement) -> None:
        """A record arrives; it may have been overtaken by a newer one."""
        known = self.records.get(record.peer_id)
        newest = self._gone.get(record.peer_id, 0) if known is None else known.seq
        if record.seq <= newest:
            return
        if record.state == "offline":
            self.drop(record.peer_id, record.seq)
        else:
            self.records[record.peer_id] = record
            self.seating.update(record)
            self._plans.clear()

    def drop(self, peer_id: str, seq: int) -> None:
        """The peer is dead, unless it was heard of after ``seq``."""
        known = self.records.get(peer_id)
        if known is None or known.seq <= seq:
            self.records.pop(peer_id, None)
            self._gone[peer_id] = max(seq, self._gone.get(peer_id, 0))
            self.seating.drop(peer_id)
            self._plans.clear()

    def plan(
        self, records: Iterable[Record], num_blocks: int, *, passed: Collection[str] = ()
    ) -> tuple[Move, ...]:
        """``plan_moves`` on this view's records, anew when they changed."""
        if passed not in self._plans:
            self._plans[passed] = best_moves(self.seating, passed)
        self.listed = len(self._plans[passed])
        return self._plans[passed]


@dataclass(eq=False)
class Machine:
    """One machine. ``rate`` in block-tokens/s; ``life`` counts its arrivals and departures."""

    peer_id: str
    group: Group
    memory: int
    rate: float
    bytes_per_s: float
    view: View
    phase: Phase = "away"
    span: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    seq: int = 0
    life: int = 0
    sessions: dict[int, Any] = field(default_factory=dict)

    def announcement(self, state: State, now: float) -> Announcement:
        """Its next record."""
        self.seq += 1
        start, end = self.span
        return Announcement(
            peer_id=self.peer_id,
            name="",
            fingerprint=FINGERPRINT,
            start=start,
            end=end,
            state=state,
            decode_tps=self.rate / (end - start),
            forward_tps=self.rate / (end - start),
            kv_tokens_free=1 << 20,
            queue_depth=0,
            dtype="float32",
            max_context=1 << 16,
            addrs=(),
            seq=self.seq,
            issued_at=now,
            ttl_s=12.0,
            moving_to=self.target,
        )

    def knows_itself(self) -> bool:
        """Whether its view has its latest record."""
        known = self.view.records.get(self.peer_id)
        return known is not None and known.seq == self.seq


def build(scenario: Scenario, rng: Random) -> tuple[list[Machine], list[View]]:
    """All machines, in random order of numbers, and their views."""
    regions = range(len(scenario.nodes) if scenario.news.regions else 1)
    views = [View(region, scenario.blocks) for region in regions for _ in range(VIEWS_A_REGION)]
    machines: list[Machine] = []
    for region, group in enumerate(scenario.nodes):
        near = [view for view in views if not scenario.news.regions or view.region == region]
        for _ in range(group.count):
            view = near[len(machines) % len(near)]
            machines.append(_machine(len(machines), group, scenario.blocks, view, rng))
    return machines, views


def _machine(number: int, group: Group, blocks: int, view: View, rng: Random) -> Machine:
    sizes = group.memory_blocks
    memory = rng.randint(*sizes) if len(sizes) == 2 else rng.choice(sizes)
    rate = rng.uniform(*group.rate) * rng.lognormvariate(0.0, group.rate_sigma)
    speed = rng.uniform(*group.bytes_per_s)
    return Machine(f"n{number:05d}", group, min(memory, blocks), rate, speed, view)
