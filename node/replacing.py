"""Other hops for a session that lost some, or should leave one: the node's side of recovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import trio

from petalnode.errors import NoRoute, PeerError
from petalnode.events import HopInfo, Recovered, Report, Route, Waiting
from petalnode.routing.chain import Gap, Hop
from petalnode.routing.costs import Workload
from petalnode.swarm import Swarm

WAIT_FOR_REPLACEMENT_S = 100.0
"""How long a session waits for somebody who holds its lost blocks."""
LOOK_AGAIN_S = 1.0
SLOW = 3.0
"""How many times as long as another a hop must take to be left for it."""

Learn = Callable[[str, Sequence[str]], None]
"""Remembers where a peer listens."""


class SessionReplacements:
    """See ``session.recovery.Replacements``."""

    def __init__(self, swarm: Swarm, workload: Workload, learn: Learn, report: Report) -> None:
        self._swarm, self._workload = swarm, workload
        self._learn, self._report = learn, report

    async def find(self, gap: Gap, avoid: Mapping[str, PeerError]) -> Sequence[Hop]:
        """See ``Replacements``. Says what it waits for."""
        told: tuple[int, ...] = ()
        until = trio.current_time() + WAIT_FOR_REPLACEMENT_S
        while True:
            try:
                hops = self._choose(gap, avoid)
                for hop in hops:
                    self._learn(hop.peer_id, self.addrs(hop.peer_id))
                return hops
            except NoRoute as none:
                if self._ask_again(gap, avoid):
                    continue
                left = until - trio.current_time()
                if left <= 0:
                    raise
                if none.missing != told or not told:
                    told = none.missing
                    self._report(Waiting(none.cause, left))
            with trio.move_on_after(min(left, LOOK_AGAIN_S)):
                await self._swarm.wait_changed()

    def _ask_again(self, gap: Gap, avoid: Mapping[str, PeerError]) -> bool:
        """Where nobody else is left, end the bans of those who failed once and are there, but not
        of those whom this session avoids; whether there are any."""
        now = trio.current_time()
        banned = self._swarm.health.banned(now)
        back = [
            record.peer_id
            for record in self._swarm.live()
            if record.peer_id in banned and record.peer_id not in avoid
            if record.state == "online" and record.start < gap.last and gap.first < record.end
        ]
        for peer_id in back:
            self._swarm.health.released(peer_id, now)
        return bool(back)

    def is_slow(self, hop: Hop, took_s: float) -> bool:
        """See ``Replacements``: by what the others are believed to need."""
        try:
            gap = Gap(hop.start, hop.end)
            route = self._swarm.find_route(self._workload, gap=gap, exclude=(hop.peer_id,))
        except NoRoute:
            return False
        return took_s > SLOW * route.cost_s

    def addrs(self, peer_id: str) -> tuple[str, ...]:
        """See ``Replacements``."""
        return next((a.addrs for a in self._swarm.live() if a.peer_id == peer_id), ())

    def blame(self, error: PeerError) -> None:
        """See ``Replacements``."""
        self._swarm.note_failure(error)

    def observe(self, hop: Hop, took_s: float) -> None:
        """See ``Replacements``."""
        self._swarm.observe(hop.peer_id, hop.end - hop.start, took_s)

    def report(self, event: Recovered | None, hops: Sequence[Hop]) -> None:
        """See ``Replacements``."""
        if event is not None:
            self._report(event)
        self._report(route_event(hops))

    def _choose(self, gap: Gap, avoid: Mapping[str, PeerError]) -> tuple[Hop, ...]:
        """Without those in ``avoid``; the neighbours take over themselves where nobody else can."""
        try:
            return self._swarm.find_chain(self._workload, gap=gap, exclude=avoid)
        except NoRoute:
            alone = Gap(gap.first, gap.last)
            return self._swarm.find_chain(self._workload, gap=alone, exclude=avoid)


def route_event(hops: Sequence[Hop]) -> Route:
    """A chain as events show it."""
    return Route(
        [
            HopInfo(
                hop.peer_id,
                (hop.start, hop.end),
                None if hop.rtt_s is None else hop.rtt_s * 1000,
            )
            for hop in hops
        ]
    )
