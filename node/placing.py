"""Which blocks this node holds: chosen when it joins, and chosen anew when the swarm needs it.

The rules are ``routing.placement`` and ``routing.rebalance``; here is what they need of the world:
a moment to hear of others that join at the same time, and sessions that must not be dropped.
"""

from __future__ import annotations

from functools import partial
from random import Random

import trio

from petalnode.compute import Compute
from petalnode.holding import Holding
from petalnode.routing.announcement import Announcement
from petalnode.routing.placement import choose_window
from petalnode.routing.rebalance import Move, Rebalancer, plan_moves
from petalnode.swarm import Swarm

SETTLE_S = 0.4
"""How long a newcomer listens at least for others that chose at the same moment; twice at most."""
MAX_LOOKS = 5
CHECK_S = 1.0
"""Between two looks at whether this node should move, in a small swarm."""
PLAN_SHARE = 0.03
"""Of its time that a node may spend on that; in a large swarm it looks less often."""


async def choose_span(holding: Holding, swarm: Swarm, size: int, rng: Random) -> None:
    """Announce the window where ``size`` blocks help most, unless others announced it meanwhile.

    Of nodes that choose without knowing of each other, the one with the smallest id keeps to its
    choice and the others choose around it.
    """
    num_blocks, own_id = swarm.num_blocks, holding.terms.peer_id
    before, rates = swarm.others(), holding.expected_rates()
    rate = rates.decode if rates else None
    await holding.intend(choose_window(before, num_blocks, size, rate))
    known = {a.peer_id for a in before}
    for _ in range(MAX_LOOKS):
        await trio.sleep(SETTLE_S * rng.uniform(1.0, 2.0))
        first = [a for a in swarm.others() if a.peer_id in known or _has_precedence(a, own_id)]
        chosen = choose_window(first, num_blocks, size, rate, current=holding.blocks)
        if chosen == holding.blocks:
            return
        await holding.intend(chosen)


def _has_precedence(a: Announcement, own_id: str) -> bool:
    return a.state != "joining" or a.peer_id < own_id


class Balancer:
    """Moves this node's span when the swarm needs it elsewhere. ``run`` runs for ever.

    Planning for a thousand peers takes a third of a second: ``compute`` keeps it off the event
    loop, and must not be the device's, which would keep tokens waiting.
    """

    def __init__(self, holding: Holding, swarm: Swarm, rng: Random, compute: Compute) -> None:
        self._holding = holding
        self._swarm = swarm
        self._compute = compute
        self._own_id = holding.terms.peer_id
        self._rebalancer = Rebalancer({self._own_id}, swarm.num_blocks, rng)

    async def run(self) -> None:
        """Look, now and then, and move when it is this node's turn."""
        pause_s = CHECK_S
        while True:
            await trio.sleep(pause_s)
            now = trio.current_time()
            records = self._swarm.live()
            moves = await self._compute.run(partial(self._rebalancer.check, records, now))
            pause_s = max(CHECK_S, (trio.current_time() - now) / PLAN_SHARE)
            for move in moves:
                await self._follow(move)

    async def _follow(self, move: Move) -> None:
        """Go, unless there are sessions here and others could."""
        if self._holding.sessions and await self._others_can(move):
            self._rebalancer.others_first(move)
        elif not await self._holding.move((move.start, move.end)):
            self._rebalancer.gave_up(self._own_id, trio.current_time())

    async def _others_can(self, move: Move) -> bool:
        records, num_blocks = self._swarm.live(), self._swarm.num_blocks
        passed = self._rebalancer.passed | {self._own_id}
        plan = await self._compute.run(partial(plan_moves, records, num_blocks, passed=passed))
        return any(other.urgent >= move.urgent for other in plan)
