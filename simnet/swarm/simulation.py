"""The simulation: machines come, choose, load, serve, move and go; views lag behind.

Deterministic: all chance comes from the seed, and nothing depends on the order of sets.
"""

from functools import partial
from random import Random

from petalnode.routing.announcement import State
from petalnode.routing.capacity import bound
from petalnode.simnet.swarm.clock import Action, Clock
from petalnode.simnet.swarm.machines import Machine, View, build
from petalnode.simnet.swarm.measure import Meter, Solver
from petalnode.simnet.swarm.policies import POLICIES
from petalnode.simnet.swarm.scenario import Departure, Scenario
from petalnode.simnet.swarm.traffic import Traffic

SETTLE_S = (1.0, 3.0)
"""A newcomer's pause between announcing its window and loading it: it may think better of it."""
MEASURING_S = 2.0
"""For a node to measure itself once it has loaded."""
DRAIN_POLL_S = 1.0
DRAIN_DEADLINE_S = 60.0
"""A node that cannot get rid of its sessions for so long stays where it is."""
SAMPLE_S = 10.0


class Simulation:
    """One run. ``policy`` is a name in ``POLICIES``; ``solve`` finds the bound."""

    def __init__(self, scenario: Scenario, policy: str, seed: int, solve: Solver = bound) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self._chance = Random(f"{seed}/events")
        self.machines, self.views = build(scenario, Random(f"{seed}/machines"))
        self._by_id = {machine.peer_id: machine for machine in self.machines}
        self._policy = POLICIES[policy](scenario.blocks, Random(f"{seed}/policy"))
        self.traffic = Traffic(
            scenario, self.clock, self.machines, self.views, Random(f"{seed}/traffic")
        )
        self.meter = Meter(scenario, self.machines, self.traffic, solve)
        self._schedule(Random(f"{seed}/schedule"))

    def run(self) -> Meter:
        """To the end of the scenario."""
        self.traffic.begin()
        self._sample()
        for view in self.views:
            self._look_later(view)
        self.clock.run(self.scenario.duration_s)
        self.meter.digest = self.clock.digest()
        return self.meter

    # Comings and goings. ``life`` tells whether a machine is still in the life that an action
    # was meant for.

    def _schedule(self, rng: Random) -> None:
        for machine in self.machines:
            group = machine.group
            if group.day_s:
                self._plan_days(machine, rng)
                continue
            at = rng.uniform(*group.joins_s)
            self._at(at, partial(self._arrive, machine))
            while group.up_s and at < self.scenario.duration_s:
                at += rng.expovariate(1 / group.up_s)
                self._at(at, partial(self._leave, machine, rng.random() < group.crash_share))
                if not group.down_s:
                    break
                at += rng.expovariate(1 / group.down_s)
                self._at(at, partial(self._arrive, machine))
        for departure in self.scenario.departures:
            self._plan_departure(departure, rng)

    def _plan_days(self, machine: Machine, rng: Random) -> None:
        """Every day from its group's dawn, give or take a tenth of the day."""
        group = machine.group
        day = group.day_s
        begin = (group.dawn + rng.uniform(-0.1, 0.1) - 1) * day
        while begin < self.scenario.duration_s:
            end = begin + group.awake_share * day
            if end > 0:
                # Those who are awake at the start join one after another.
                self._at(begin if begin > 0 else rng.uniform(0, 60), partial(self._arrive, machine))
                self._at(end, partial(self._leave, machine, rng.random() < group.crash_share))
            begin += day

    def _plan_departure(self, departure: Departure, rng: Random) -> None:
        able = [m for m in self.machines if departure.group in ("", m.group.name)]
        for machine in rng.sample(able, round(len(able) * departure.share)):
            at = departure.at_s + rng.uniform(0, departure.over_s)
            self._at(at, partial(self._leave, machine, rng.random() < departure.crash_share))

    def _at(self, time_s: float, action: Action) -> None:
        self.clock.after(max(time_s - self.clock.now, 0.0), action)

    def _later(self, machine: Machine, delay_s: float, action: Action) -> None:
        """``action``, unless the machine leaves before."""
        life = machine.life

        def act() -> None:
            if machine.life == life:
                action()

        self.clock.after(delay_s, act)

    def _arrive(self, machine: Machine) -> None:
        if machine.phase != "away":
            return
        machine.life += 1
        machine.view.members.add(machine.peer_id)
        machine.phase = "joining"
        machine.span = (0, 0)
        self._later(machine, self._policy.join_delay_s(), partial(self._join, machine))

    def _join(self, machine: Machine) -> None:
        machine.span = self._policy.join(machine)
        self._publish(machine, "joining")
        pause = self._chance.uniform(*SETTLE_S)
        self._later(machine, pause, partial(self._settle, machine))

    def _settle(self, machine: Machine) -> None:
        span = self._policy.reconsider(machine)
        if span != machine.span:
            machine.span = span
            self._publish(machine, "joining")
        self._load(machine, machine.memory)

    def _leave(self, machine: Machine, crashes: bool) -> None:
        if machine.phase == "away":
            return
        announced = machine.span != (0, 0)
        machine.life += 1
        machine.phase, machine.target = "away", None
        machine.view.members.discard(machine.peer_id)
        self.clock.note("crash" if crashes else "leave", machine.peer_id)
        self.traffic.gone(machine)
        if not announced:
            return
        if crashes:
            low, high = self.scenario.news.death_s
            for view in self.views:
                notice = partial(view.drop, machine.peer_id, machine.seq)
                self.clock.after(self._chance.uniform(low, high), notice)
        else:
            self._publish(machine, "offline")

    # Serving and moving.

    def _load(self, machine: Machine, blocks: int) -> None:
        seconds = blocks * self.scenario.block_bytes / machine.bytes_per_s + MEASURING_S
        self._later(machine, seconds, partial(self._serve, machine))

    def _serve(self, machine: Machine) -> None:
        machine.phase, machine.target = "online", None
        self._publish(machine, "online")
        self._check_later(machine)

    def _check_later(self, machine: Machine) -> None:
        delay = self._policy.check_delay_s()
        if delay is not None:
            self._later(machine, delay, partial(self._check, machine))

    def _check(self, machine: Machine) -> None:
        if machine.knows_itself() and self._policy.check(machine):
            self._move(machine, machine.span)
        else:
            self._check_later(machine)

    def _look_later(self, view: View) -> None:
        delay = self._policy.look_delay_s(view)
        if delay is not None:
            self.clock.after(delay, partial(self._look, view))

    def _look(self, view: View) -> None:
        for move in self._policy.due(view, self.clock.now):
            machine = self._by_id[move.peer_id]
            if machine.phase == "online" and machine.knows_itself():
                self._move(machine, (move.start, move.end))
        self._look_later(view)

    def _move(self, machine: Machine, target: tuple[int, int]) -> None:
        self.meter.moves += 1
        self.clock.note("move", machine.peer_id, *target)
        if not self._policy.drains:
            self._restart(machine)
            return
        machine.phase, machine.target = "draining", target
        self.meter.note_moving()
        self._publish(machine, "draining")
        self.traffic.drain(machine)
        self._drained(machine, self.clock.now + DRAIN_DEADLINE_S)

    def _drained(self, machine: Machine, deadline_s: float) -> None:
        if machine.sessions and self.clock.now < deadline_s:
            again = partial(self._drained, machine, deadline_s)
            self._later(machine, DRAIN_POLL_S, again)
        elif machine.sessions:
            self.meter.moves_given_up += 1
            self._policy.gave_up(machine, self.clock.now)
            self._serve(machine)
        else:
            assert machine.target is not None
            held = range(*machine.span)
            loads = sum(1 for block in range(*machine.target) if block not in held)
            machine.phase, machine.span = "moving", machine.target
            self.meter.blocks_loaded += loads
            self._publish(machine, "joining")
            self._load(machine, loads)

    def _restart(self, machine: Machine) -> None:
        """As Petals moves: what runs here is dropped, and the server starts anew."""
        self.traffic.drop(machine)
        machine.phase = "moving"
        self.meter.note_moving()
        self._publish(machine, "offline")
        self.meter.blocks_loaded += machine.memory
        self._later(machine, self._policy.join_delay_s(), partial(self._join, machine))

    def _publish(self, machine: Machine, state: State) -> None:
        record = machine.announcement(state, self.clock.now)
        self.clock.note(state, machine.peer_id, *machine.span)
        news = self.scenario.news
        for view in self.views:
            delay = self._chance.uniform(*news.spread_s)
            if view.region != machine.view.region:
                delay += news.far_s
            self.clock.after(delay, partial(view.take, record))

    def _sample(self) -> None:
        self.meter.sample(self.clock.now)
        self.clock.after(SAMPLE_S, self._sample)
