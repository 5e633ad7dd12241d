"""Who takes which blocks: ours, the paper's rule, and two that never move anybody."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from petalnode.routing import paper_rule
from petalnode.routing.placement import best_window
from petalnode.routing.rebalance import Move, Rebalancer
from petalnode.simnet.swarm.machines import Machine, View

LOOK_S = 1.0
"""How often a node of ours looks whether it should move."""
LOOK_S_PER_PEER = 0.01
MAX_LOOK_S = 25.0
"""After a list it waits longer, for making one took so long: a third of a second for 1,000 peers,
of its time a node gives 3 % (``petalnode.placing``)."""


class Policy(Protocol):
    """One rule of placement. ``drains``: it moves sessions away before it moves a node."""

    drains: bool

    def join_delay_s(self) -> float:
        """How long a joining machine waits before it chooses."""

    def join(self, machine: Machine) -> tuple[int, int]:
        """The window that it announces."""

    def reconsider(self, machine: Machine) -> tuple[int, int]:
        """The window that it loads, shortly after."""

    def check_delay_s(self) -> float | None:
        """Until the next ``check``; None: there is none."""

    def check(self, machine: Machine) -> bool:
        """Whether the machine leaves now, to choose again once it is gone."""

    def look_delay_s(self, view: View) -> float | None:
        """Until those who share the view look at it again; None: they do not."""

    def due(self, view: View, now: float) -> Sequence[Move]:
        """Who of those who share the view moves now, and where."""

    def gave_up(self, machine: Machine, now: float) -> None:
        """The machine could not drain, and stays."""


class Still:
    """The paper's choice on joining; nobody ever moves."""

    drains = True

    def __init__(self, num_blocks: int, rng: Random) -> None:
        self._num_blocks = num_blocks
        self._rng = rng

    def join_delay_s(self) -> float:
        return self._rng.uniform(0.0, 2 * paper_rule.MEAN_SELECTION_DELAY_S)

    def join(self, machine: Machine) -> tuple[int, int]:
        records = machine.view.records.values()
        start = paper_rule.choose_start(records, self._num_blocks, machine.memory)
        return start, start + machine.memory

    def reconsider(self, machine: Machine) -> tuple[int, int]:
        return machine.span

    def check_delay_s(self) -> float | None:
        return None

    def check(self, machine: Machine) -> bool:
        return False

    def look_delay_s(self, view: View) -> float | None:
        return None

    def due(self, view: View, now: float) -> Sequence[Move]:
        return ()

    def gave_up(self, machine: Machine, now: float) -> None:
        """Nobody moves here."""


class Chance(Still):
    """Any window, for good, such that the ends of the model get as much as its middle."""

    def join(self, machine: Machine) -> tuple[int, int]:
        start = self._rng.randint(1 - machine.memory, self._num_blocks - 1)
        start = min(max(start, 0), self._num_blocks - machine.memory)
        return start, start + machine.memory


class Paper(Still):
    """The Petals paper's rule, with the constants of its program."""

    drains = False

    def check_delay_s(self) -> float | None:
        return self._rng.uniform(0.0, 2 * paper_rule.MEAN_CHECK_PERIOD_S)

    def check(self, machine: Machine) -> bool:
        records = machine.view.records.values()
        return paper_rule.should_move(machine.peer_id, records, self._num_blocks, self._rng)


class Ours(Still):
    """``routing.placement`` and ``routing.rebalance``."""

    def __init__(self, num_blocks: int, rng: Random) -> None:
        super().__init__(num_blocks, rng)
        self._minds: dict[View, Rebalancer] = {}

    def join_delay_s(self) -> float:
        return 0.0

    def join(self, machine: Machine) -> tuple[int, int]:
        return self._choose(machine, None)

    def reconsider(self, machine: Machine) -> tuple[int, int]:
        return self._choose(machine, machine.span)

    def look_delay_s(self, view: View) -> float | None:
        slow_s = LOOK_S_PER_PEER * len(view.records) if view.listed else 0.0
        return max(LOOK_S, min(slow_s, MAX_LOOK_S))

    def due(self, view: View, now: float) -> Sequence[Move]:
        return self._mind(view).check(view.records.values(), now)

    def gave_up(self, machine: Machine, now: float) -> None:
        self._mind(machine.view).gave_up(machine.peer_id, now)

    def _mind(self, view: View) -> Rebalancer:
        if view not in self._minds:
            self._minds[view] = Rebalancer(view.members, self._num_blocks, self._rng, view.plan)
        return self._minds[view]

    def _choose(self, machine: Machine, current: tuple[int, int] | None) -> tuple[int, int]:
        seating = machine.view.seating
        own = seating.drop(machine.peer_id)
        chosen = best_window(seating, machine.memory, machine.rate, current)
        if own is not None:
            seating.put(own)
        return chosen


POLICIES: dict[str, Callable[[int, Random], Policy]] = {
    "none": Still,
    "random": Chance,
    "paper": Paper,
    "ours": Ours,
}
