"""What a run shows: samples over time, and their means once the swarm has settled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petalnode.routing.capacity import Board, Seat
from petalnode.simnet.swarm.machines import Machine
from petalnode.simnet.swarm.scenario import Scenario
from petalnode.simnet.swarm.traffic import Traffic

Solver = Callable[[Sequence[tuple[int, float]], int], float]
"""The bound of (blocks that fit, block-tokens/s) on so many blocks: ``routing.capacity.bound``."""
FEW = 50
"""In a swarm of fewer machines a single one on the move is more than 2 %."""


@dataclass(frozen=True)
class Sample:
    """The swarm at one moment. ``tps``: what its online machines carry, ``bound``: what all
    machines that are there could at best, both in tokens/s. ``copies``: online machines that hold
    the least held block. ``moving``: machines that drain or load because they move."""

    at_s: float
    present: int
    online: int
    moving: int
    tps: float
    bound: float
    copies: int
    sessions: int

    @property
    def share(self) -> float:
        """Of the bound; a swarm that cannot hold the model has nothing to miss."""
        return self.tps / self.bound if self.bound > 0 else 1.0


class Meter:
    """Samples and counts of one run."""

    def __init__(
        self, scenario: Scenario, machines: Sequence[Machine], traffic: Traffic, solve: Solver
    ) -> None:
        self.samples: list[Sample] = []
        self.replicas: list[int] = []
        self.seats: list[Seat] = []  # of those that were online at the last sample
        self.moves = self.moves_given_up = self.blocks_loaded = 0
        self.most_moving = 0.0  # share of the machines, of at least FEW
        self.digest = ""
        self.traffic = traffic
        self._scenario = scenario
        self._machines = machines
        self._solve = solve
        self._bounds: dict[tuple[str, ...], float] = {}

    def sample(self, now: float) -> None:
        """Measure the swarm as it is, not as anybody sees it."""
        there = [machine for machine in self._machines if machine.phase != "away"]
        online = [machine for machine in there if machine.phase == "online"]
        taken = [Seat(m.peer_id, *m.span, m.rate) for m in online]
        board = Board(taken, self._scenario.blocks)
        best = self._bound(there)
        self.replicas, self.seats = board.replicas, taken
        self.samples.append(
            Sample(
                at_s=now,
                present=len(there),
                online=len(online),
                moving=sum(1 for m in there if m.phase in ("draining", "moving")),
                tps=board.throughput(best),
                bound=best,
                copies=min(board.replicas),
                sessions=self.traffic.live,
            )
        )

    def note_moving(self) -> None:
        """To be called when a machine begins to move."""
        there = [machine for machine in self._machines if machine.phase != "away"]
        moving = sum(1 for m in there if m.phase in ("draining", "moving"))
        if len(there) >= FEW:
            self.most_moving = max(self.most_moving, moving / len(there))

    def _bound(self, there: Sequence[Machine]) -> float:
        key = tuple(machine.peer_id for machine in there)
        if key not in self._bounds:
            nodes = [(machine.memory, machine.rate) for machine in there]
            self._bounds[key] = self._solve(nodes, self._scenario.blocks)
        return self._bounds[key]


@dataclass(frozen=True)
class Summary:
    """One run in numbers. Shares are of the bound, over the samples of the settled part."""

    share: float
    worst_share: float
    most_moving: float
    moves: int
    moves_given_up: int
    blocks_loaded: int
    sessions: int
    refused: int
    migrated: int
    recovered: int
    dropped_by_moves: int
    lost_to_deaths: int
    hops: float
    digest: str


def summarize(meter: Meter, steady_from_s: float) -> Summary:
    """The summary of a finished run."""
    steady = [sample.share for sample in meter.samples if sample.at_s >= steady_from_s]
    traffic = meter.traffic
    return Summary(
        share=sum(steady) / len(steady),
        worst_share=min(steady),
        most_moving=meter.most_moving,
        moves=meter.moves,
        moves_given_up=meter.moves_given_up,
        blocks_loaded=meter.blocks_loaded,
        sessions=traffic.opened,
        refused=traffic.refused,
        migrated=traffic.migrated,
        recovered=traffic.recovered,
        dropped_by_moves=traffic.dropped_by_moves,
        lost_to_deaths=traffic.lost_to_deaths,
        hops=traffic.hops / max(traffic.opened, 1),
        digest=meter.digest,
    )
