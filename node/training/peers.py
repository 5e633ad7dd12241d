"""Who can train, by what this node's swarm says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

from petalnode.errors import NoRoute, PeerError
from petalnode.routing.chain import Gap
from petalnode.routing.costs import Workload, why_not
from petalnode.routing.delays import UNKNOWN_RTT_S
from petalnode.swarm import Swarm
from petalnode.training.spread import Offer, Stage

MAX_CHAINS = 4
"""Chains without a common peer that are looked for: each has hops that others may not cover."""


class Peers(Protocol):
    """What a training session needs to know of others."""

    def offers(self) -> Sequence[Offer]:
        """Who may be asked now."""

    def stages(self, span: Stage, tokens: int, avoid: Collection[str]) -> set[Stage]:
        """The hops of good chains through these blocks. Raises ``NoRoute`` if there is none."""

    async def wait_changed(self) -> None:
        """Until something about them changes."""

    def failed(self, error: PeerError) -> None:
        """Judge what went wrong with one of them."""

    def worked(self, peer_id: str, blocks: int, seconds_per_token: float, kind: str) -> None:
        """One did what it was asked, and how fast."""


class SwarmPeers:
    """See ``Peers``. ``learn`` remembers where somebody listens."""

    def __init__(
        self, swarm: Swarm, workload: Workload, learn: Callable[[str, Sequence[str]], None]
    ) -> None:
        self._swarm, self._workload, self._learn = swarm, workload, learn

    def offers(self) -> Sequence[Offer]:
        """See ``Peers``."""
        known, offers = self._swarm.knowledge(), []
        for record in self._swarm.live():
            if why_not(record, self._workload, known) is not None:
                continue
            self._learn(record.peer_id, record.addrs)
            said_s = 1 / (record.forward_tps * (record.end - record.start))
            block_s = known.forward_s.get(record.peer_id, said_s)
            visit_s = known.rtts.get(record.peer_id, UNKNOWN_RTT_S)
            offers.append(Offer(record.peer_id, record.start, record.end, block_s, visit_s))
        return offers

    def stages(self, span: Stage, tokens: int, avoid: Collection[str]) -> set[Stage]:
        """See ``Peers``."""
        stages: set[Stage] = set()
        taken, workload = set(avoid), replace(self._workload, bulk_tokens=tokens)
        for number in range(MAX_CHAINS):
            try:
                hops = self._swarm.find_chain(workload, gap=Gap(*span), exclude=taken)
            except NoRoute:
                if number == 0:
                    raise
                break
            stages.update((hop.start, hop.end) for hop in hops)
            taken.update(hop.peer_id for hop in hops)
        return stages

    async def wait_changed(self) -> None:
        """See ``Peers``."""
        await self._swarm.wait_changed()

    def failed(self, error: PeerError) -> None:
        """See ``Peers``."""
        self._swarm.note_failure(error)

    def worked(self, peer_id: str, blocks: int, seconds_per_token: float, kind: str) -> None:
        """See ``Peers``: what backward takes says nothing about other work."""
        if kind == "forward":
            self._swarm.observe(peer_id, blocks, seconds_per_token, bulk=True)
        else:
            self._swarm.health.succeeded(peer_id)
