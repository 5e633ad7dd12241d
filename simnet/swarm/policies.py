"""Who takes which blocks: ours, the paper's rule, and two that never move anybody."""

from collections.abc import Callable
from random import Random
from typing import Protocol

from petalnode.routing import paper_rule
from petalnode.routing.placement import choose_window
from petalnode.routing.rebalance import Rebalancer
from petalnode.simnet.swarm.machines import Machine

CHECK_S = 5.0
"""How often a node of ours looks at its view."""


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

    def check(self, machine: Machine, now: float) -> tuple[int, int] | None:
        """Where the machine moves now, if anywhere."""

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

    def check(self, machine: Machine, now: float) -> tuple[int, int] | None:
        return None

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

    def check(self, machine: Machine, now: float) -> tuple[int, int] | None:
        records = machine.view.records.values()
        if paper_rule.should_move(machine.peer_id, records, self._num_blocks, self._rng):
            return machine.span  # it chooses once it is gone
        return None


class Ours(Still):
    """``routing.placement`` and ``routing.rebalance``."""

    drains = True

    def join_delay_s(self) -> float:
        return 0.0

    def join(self, machine: Machine) -> tuple[int, int]:
        return self._choose(machine, None)

    def reconsider(self, machine: Machine) -> tuple[int, int]:
        return self._choose(machine, machine.span)

    def check_delay_s(self) -> float | None:
        return CHECK_S * self._rng.uniform(0.5, 1.5)

    def check(self, machine: Machine, now: float) -> tuple[int, int] | None:
        if machine.mind is None:
            machine.mind = Rebalancer(
                machine.peer_id, self._num_blocks, self._rng, machine.view.plan
            )
        move = machine.mind.check(machine.view.records.values(), now)
        return None if move is None else (move.start, move.end)

    def gave_up(self, machine: Machine, now: float) -> None:
        machine.mind.gave_up(now)

    def _choose(self, machine: Machine, current: tuple[int, int] | None) -> tuple[int, int]:
        records = machine.view.records
        others = [record for peer, record in records.items() if peer != machine.peer_id]
        return choose_window(others, self._num_blocks, machine.memory, machine.rate, current)


POLICIES: dict[str, Callable[[int, Random], Policy]] = {
    "none": Still,
    "random": Chance,
    "paper": Paper,
    "ours": Ours,
}
