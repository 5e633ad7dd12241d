"""What a node knows of its swarm: view, distances, health, speeds, and so the choice of chains.

Task tree: ``run`` (``probing``) and ``beat`` (``announcing``) run in the node's nursery; the gossip
transport has its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from random import Random

import trio

from petalnode.announcing import Announcer
from petalnode.errors import NoRoute, PeerError, PeerGone, PeerUnreachable
from petalnode.events import Report, Waiting
from petalnode.joining import Joined, public_name
from petalnode.machine import Machine
from petalnode.models.checkpoint import Checkpoint
from petalnode.p2p.gossip import Gossip, open_gossip
from petalnode.p2p.hello import HELLO_PROTOCOL, About, hello_handler
from petalnode.p2p.host import Host
from petalnode.p2p.identity import Identity
from petalnode.probing import Watch
from petalnode.routing.announcement import Announcement
from petalnode.routing.beats import ANNOUNCED_RTTS, interesting_peers, rtts_to_announce
from petalnode.routing.chain import Gap, Hop, Route, Router
from petalnode.routing.costs import ANYTHING, Knowledge, Workload
from petalnode.routing.explain import explain
from petalnode.routing.health import PeerHealth
from petalnode.routing.speeds import MAX_PEERS, SpeedLedger
from petalnode.routing.view import SwarmView

MEASURE_DEADLINE_S = 2.0
"""For measuring the way to peers before a chain is chosen."""
MAX_MEASURED = 32
WAIT_FOR_BLOCKS_S = 20.0
"""How long a session waits for blocks that nobody serves."""
RETRY_S = 1.0
"""How often it looks again while nothing changes: bans end."""
RECHOOSE_S = 600.0
"""For how long the same round trips are announced."""


class Swarm:
    """One node's part in its swarm. Made by ``open_swarm``."""

    def __init__(
        self, network: str, num_blocks: int, host: Host, gossip: Gossip, machine: Machine
    ) -> None:
        self.network = network
        self.num_blocks = num_blocks
        self.view = view = gossip.view
        self.gossip = gossip
        self.health = PeerHealth()
        self._host = host
        self._rng: Random = machine.rng
        self._announcer = Announcer(gossip, machine.rng)
        self._watch = Watch(
            host,
            gossip,
            lambda: self._announcer.said,
            self._announcer.census,
            machine.rng,
            machine.wall_clock,
        )
        self._router = Router(num_blocks)
        self._decode, self._forward = SpeedLedger(), SpeedLedger()
        self._measured_on: dict[str, tuple[int, int, str]] = {}  # as _served; oldest first
        self._wanted: list[str] = []
        self._chosen_at = 0.0
        self._changed = trio.Event()
        view.on_change = self._wake

    # Who there is

    def live(self) -> list[Announcement]:
        """What is announced and not expired."""
        return self.view.live(trio.current_time())

    def others(self) -> list[Announcement]:
        """The same without this node."""
        return [a for a in self.live() if a.peer_id != self._host.peer_id]

    def rtts(self) -> Mapping[str, float]:
        """Measured round trips in seconds; this node is no distance from itself."""
        return self._watch.rtts()

    def knowledge(self) -> Knowledge:
        """What this node knows by itself, beyond what the peers say."""
        now = trio.current_time()
        self._forget_changed(now)
        return Knowledge(
            own_id=self._host.peer_id,
            rtts=self.rtts(),
            decode_s=self._decode.block_s(now),
            forward_s=self._forward.block_s(now),
            banned=self.health.banned(now),
            suspected=self.gossip.suspicions.suspected(now),
        )

    async def wait_changed(self) -> None:
        """Until the view changes."""
        await self._changed.wait()

    # Chains

    def find_chain(
        self,
        workload: Workload = ANYTHING,
        *,
        exclude: Collection[str] = (),
        gap: Gap | None = None,
    ) -> tuple[Hop, ...]:
        """A chain for ``workload`` over the model, or over ``gap``, without those in ``exclude``.

        Sessions that ask alike are spread over chains that are about as good. Raises ``NoRoute``.
        """
        return self.find_route(workload, exclude=exclude, gap=gap).hops

    def find_route(
        self,
        workload: Workload = ANYTHING,
        *,
        exclude: Collection[str] = (),
        gap: Gap | None = None,
    ) -> Route:
        """The same with what it costs."""
        return self._router.find(
            self.live(), self.knowledge(), workload, gap=gap, exclude=exclude, rng=self._rng
        )

    def explain(self, workload: Workload = ANYTHING) -> Mapping[str, str]:
        """For every peer id: its part in the best chain there is now, or why it has none."""
        return explain(self._router, self.live(), self.knowledge(), workload)

    async def wait_covered(self, report: Report, workload: Workload = ANYTHING) -> None:
        """Until there is a chain for ``workload``, with a reason while waiting.

        Raises ``NoRoute``, naming the blocks, after ``WAIT_FOR_BLOCKS_S``.
        """
        told = ""
        until = trio.current_time() + WAIT_FOR_BLOCKS_S
        while True:
            changed = self._changed
            try:
                self._router.find(self.live(), self.knowledge(), workload)
                return
            except NoRoute as no_route:
                left = until - trio.current_time()
                if left <= 0:
                    waited = f"{no_route.cause} Waited {WAIT_FOR_BLOCKS_S:.0f} s for that to end."
                    raise NoRoute(waited, no_route.remedy, no_route.missing) from None
                if no_route.cause != told:
                    told = no_route.cause
                    report(Waiting(no_route.cause, left))
            with trio.move_on_after(min(left, RETRY_S)):
                await changed.wait()

    async def probe(self) -> None:
        """Measure the way to peers whose distance is unknown, before a chain is chosen."""
        known = self.rtts()
        unknown = [a for a in self.others() if a.peer_id not in known]
        drawn = self._rng.sample(unknown, min(MAX_MEASURED, len(unknown)))
        await self._watch.measure(drawn, MEASURE_DEADLINE_S)

    # What became of them

    def note_failure(self, error: PeerError) -> None:
        """Judge an error: a peer that failed is out of routing from now on, and is probed at once.

        A refusal, and our own fault, are never held against anybody.
        """
        if not self.health.note(error, trio.current_time()):
            return
        if isinstance(error, PeerGone | PeerUnreachable):
            self._watch.check(error.peer_id)

    def observe(
        self, peer_id: str, blocks: int, seconds_per_token: float, *, bulk: bool = False
    ) -> None:
        """A peer took so long for a token through ``blocks`` blocks, its queue included.

        It did what it was asked: whatever it had failed at before is forgiven.
        """
        ledger = self._forward if bulk else self._decode
        now = trio.current_time()
        self._forget_changed(now)
        ledger.observe(peer_id, seconds_per_token / blocks, now)
        if (record := self.view.get(peer_id, now)) is not None:
            self._measured_on.pop(peer_id, None)
            self._measured_on[peer_id] = _served(record)
            if len(self._measured_on) > MAX_PEERS:
                del self._measured_on[next(iter(self._measured_on))]
        self.health.succeeded(peer_id)

    def _forget_changed(self, now: float) -> None:
        """Whoever serves other blocks by now, or quantizes otherwise, has yet to be measured."""
        for peer_id, before in list(self._measured_on.items()):
            record = self.view.get(peer_id, now)
            if record is not None and _served(record) != before:
                del self._measured_on[peer_id]
                self._decode.forget(peer_id)
                self._forward.forget(peer_id)

    # What we say

    async def run(self) -> None:
        """Stay connected, measure, find out who died. Runs for ever."""
        await self._watch.run()

    async def beat(self, announce: Callable[[], Announcement], room: Callable[[], int]) -> None:
        """Publish what ``announce`` says, again and again; ``room`` is for tokens in the attention
        cache. Runs for ever."""
        await self._announcer.beat(announce, room)

    async def publish(self, announcement: Announcement) -> None:
        """Tell the swarm at once."""
        await self._announcer.publish(announcement)

    @property
    def ttl_s(self) -> float:
        """How long a record published now should live."""
        return self._announcer.ttl_s

    def rtts_to_announce(self) -> Mapping[str, float]:
        """The measured round trips that our next record should have, as it has them."""
        said = self._announcer.said
        if said is None:
            return {}
        now, others = trio.current_time(), self.others()
        alive = {a.peer_id for a in others}
        self._wanted = [peer_id for peer_id in self._wanted if peer_id in alive]
        lacking = len(self._wanted) < min(ANNOUNCED_RTTS, len(others))
        if lacking or now - self._chosen_at >= RECHOOSE_S:
            self._wanted = interesting_peers(
                said, others, self.rtts(), self._rng, limit=ANNOUNCED_RTTS
            )
            self._chosen_at = now
            self._watch.measure_too(self._wanted)
        return rtts_to_announce(self.rtts(), self._wanted, said.rtts)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


def _served(record: Announcement) -> tuple[int, int, str]:
    """What a peer's speed was measured on."""
    return record.start, record.end, record.quant


@asynccontextmanager
async def open_swarm(
    host: Host, identity: Identity, checkpoint: Checkpoint, joined: Joined, machine: Machine
) -> AsyncIterator[Swarm]:
    """Take part in gossip, starting from what a contact knew, and answer those who say hello."""
    num_blocks = checkpoint.config.num_blocks
    async with open_gossip(
        host,
        identity,
        network=joined.network,
        fingerprint=checkpoint.fingerprint,
        view=SwarmView(num_blocks, rng=machine.rng),
        wall_clock=machine.wall_clock,
        rng=machine.rng,
    ) as gossip:
        await gossip.absorb_snapshot(joined.records)
        about = About(joined.network, public_name(checkpoint), checkpoint.fingerprint, num_blocks)
        host.serve(HELLO_PROTOCOL, hello_handler(about, gossip.snapshot, gossip.absorb))
        yield Swarm(joined.network, num_blocks, host, gossip, machine)
