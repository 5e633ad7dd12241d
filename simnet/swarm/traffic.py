"""Clients and their sessions: which machines they use, and what becomes of them.

Chains are chosen by ``routing.chain`` from a lagging view. A session whose machine drains or dies
gets other machines for exactly that machine's blocks, as the real client does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from petalnode.errors import NoRoute
from petalnode.routing.chain import Gap, Hop, Router
from petalnode.routing.costs import Knowledge
from petalnode.simnet.swarm.clock import Action, Clock
from petalnode.simnet.swarm.machines import Machine, View
from petalnode.simnet.swarm.scenario import Scenario

ACCESS_RTT_S = (0.005, 0.04)
NEAR_RTT_S, FAR_RTT_S = 0.01, 0.11
RECOVERY_S = (0.5, 3.0)
"""For a client to notice, and to replay into the replacement."""


@dataclass(eq=False)
class Session:
    """One client's use of a chain. The client sees the swarm through ``view``."""

    number: int
    view: View
    hops: list[Hop]
    open: bool = True


class Traffic:
    """All sessions. What happened to them is counted in the public attributes.

    ``hops`` is the sum over all chains that were opened.
    """

    def __init__(
        self,
        scenario: Scenario,
        clock: Clock,
        machines: Sequence[Machine],
        views: Sequence[View],
        rng: Random,
    ) -> None:
        self.opened = self.refused = self.live = self.hops = 0
        self.migrated = self.recovered = 0
        self.dropped_by_moves = self.lost_to_deaths = 0
        self._scenario = scenario
        self._clock = clock
        self._views = views
        self._rng = rng
        self._machines = {machine.peer_id: machine for machine in machines}
        self._routers = {view: Router(scenario.blocks) for view in views}
        self._rtts = round_trips(machines, views, scenario.news.regions, rng)

    def begin(self) -> None:
        """Schedule the next session."""
        self._clock.after(self._rng.expovariate(1 / self._scenario.sessions.every_s), self._next)

    def _next(self) -> None:
        self._open()
        self.begin()

    def _open(self) -> None:
        view = self._rng.choice(self._views)
        try:
            hops = self._find(view, Gap(0, self._scenario.blocks))
        except NoRoute:
            self.refused += 1
            return
        self.opened += 1
        self.live += 1
        self.hops += len(hops)
        session = Session(self.opened, view, list(hops))
        for hop in session.hops:
            self._machines[hop.peer_id].sessions[session.number] = session
        lasts = self._rng.expovariate(1 / self._scenario.sessions.mean_s)
        self._clock.after(lasts, partial(self._end, session))

    def drain(self, machine: Machine) -> None:
        """Every session of the machine looks for others to take its blocks."""
        for session in list(machine.sessions.values()):
            self._soon(partial(self._migrate, session, machine))

    def gone(self, machine: Machine) -> None:
        """The machine is dead or has left: its sessions replay elsewhere, or are lost."""
        for session in list(machine.sessions.values()):
            self._soon(partial(self._recover, session, machine))

    def drop(self, machine: Machine) -> None:
        """The machine moves without draining."""
        for session in list(machine.sessions.values()):
            self.dropped_by_moves += 1
            self._end(session)

    def _soon(self, action: Action) -> None:
        self._clock.after(self._rng.uniform(*RECOVERY_S), action)

    def _migrate(self, session: Session, machine: Machine) -> None:
        """Off a draining machine; tries again for as long as both are there."""
        if session.number not in machine.sessions or machine.phase != "draining":
            return
        if self._replace(session, machine):
            self.migrated += 1
        else:
            self._soon(partial(self._migrate, session, machine))

    def _recover(self, session: Session, machine: Machine) -> None:
        if session.number not in machine.sessions:
            return
        if self._replace(session, machine):
            self.recovered += 1
        else:
            self.lost_to_deaths += 1
            self._end(session)

    def _replace(self, session: Session, machine: Machine) -> bool:
        """Other peers for exactly the blocks that the machine computes for this session."""
        hops: list[Hop] = []
        try:
            for hop in session.hops:
                mine = hop.peer_id == machine.peer_id
                gap = Gap(hop.start, hop.end)
                hops += self._find(session.view, gap, machine.peer_id) if mine else [hop]
        except NoRoute:
            return False
        self._forget(session)
        session.hops = hops
        for hop in hops:
            self._machines[hop.peer_id].sessions[session.number] = session
        return True

    def _find(self, view: View, gap: Gap, exclude: str = "") -> tuple[Hop, ...]:
        """Raises ``NoRoute``, also when the view is behind and the chain's peers are not there."""
        records = [record for peer, record in sorted(view.records.items()) if peer != exclude]
        known = Knowledge(rtts=self._rtts[view.region])
        route = self._routers[view].find(records, known, gap=gap, rng=self._rng)
        for hop in route.hops:
            machine = self._machines[hop.peer_id]
            inside = machine.span[0] <= hop.start and hop.end <= machine.span[1]
            if machine.phase != "online" or not inside:
                raise NoRoute(f"{hop.peer_id} refuses.")
        return route.hops

    def _end(self, session: Session) -> None:
        if session.open:
            session.open = False
            self.live -= 1
            self._forget(session)

    def _forget(self, session: Session) -> None:
        for hop in session.hops:
            self._machines[hop.peer_id].sessions.pop(session.number, None)


def round_trips(
    machines: Sequence[Machine], views: Sequence[View], far: bool, rng: Random
) -> dict[int, dict[str, float]]:
    """Seconds from a client in each region to each machine: both ends' access, and the distance."""
    access = {machine.peer_id: rng.uniform(*ACCESS_RTT_S) for machine in machines}
    return {
        region: {
            machine.peer_id: access[machine.peer_id]
            + (FAR_RTT_S if far and machine.view.region != region else NEAR_RTT_S)
            for machine in machines
        }
        for region in {view.region: None for view in views}
    }
