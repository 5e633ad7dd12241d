"""Looking at a swarm from outside: what ``petalnode status`` shows. Loads no model and no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from petalnode.errors import NoRoute, PeerError
from petalnode.events import PeerInfo, Swarm, Unused
from petalnode.joining import contact_swarm
from petalnode.p2p.envelope import unseal
from petalnode.p2p.hello import Hello
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import new_identity
from petalnode.p2p.invite import Invite
from petalnode.routing.announcement import Announcement, InvalidAnnouncement, check_clock
from petalnode.routing.chain import Router
from petalnode.routing.costs import Knowledge
from petalnode.routing.explain import explain
from petalnode.routing.view import NEWS, SwarmView

PROBE_DEADLINE_S = 3.0
MAX_PROBES = 32
"""Under way at the same time."""
MAX_CONTACTS = 8
"""Peers that are asked beside those that were named, once they are known."""


class Survey:
    """Looks at one swarm again and again. Made by ``open_survey``."""

    def __init__(
        self,
        host: Host,
        joins: Sequence[Invite | str],
        fingerprint: str | None,
        wall_clock: Callable[[], float],
    ) -> None:
        self._host = host
        self._joins = list(joins)
        self._others: list[str] = []
        self._fingerprint = fingerprint
        self._wall_clock = wall_clock
        self._network = next((join.network for join in joins if isinstance(join, Invite)), None)

    async def look(self) -> Swarm:
        """Ask the first contact that answers for its records, and measure the way to each peer.

        Later looks ask whom the earlier ones found too: the contact may be the one that died.
        Raises ``SwarmMismatch`` or ``PeerUnreachable``.
        """
        joins = [*self._joins, *self._others]
        hello = await contact_swarm(
            self._host, joins, network=self._network, fingerprint=self._fingerprint
        )
        self._network, self._fingerprint = hello.network, hello.fingerprint
        records, refused = valid_records(hello, self._wall_clock())
        self._others = [addr for a in records[:MAX_CONTACTS] for addr in a.addrs]
        rtts = await measure(self._host, records)
        return describe_swarm(hello.model, hello.blocks, records, rtts, refused)


@asynccontextmanager
async def open_survey(
    joins: Sequence[Invite | str],
    fingerprint: str | None,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Survey]:
    """A stranger's view of the swarm that ``joins`` name; ``fingerprint`` None: of any model."""
    async with open_host(new_identity(), listen=()) as host:
        yield Survey(host, joins, fingerprint, wall_clock)


def valid_records(hello: Hello, wall_now: float) -> tuple[list[Announcement], Counter[str]]:
    """What a contact said about its swarm, as far as it is signed, fresh, and of that swarm: the
    latest of each peer that lives, in the order of their blocks; and why others were refused."""
    view, refused = SwarmView(hello.blocks), Counter[str]()
    for sighting in hello.records:
        try:
            record = unseal(sighting.raw)
            check_clock(record, wall_now)
        except InvalidAnnouncement as error:
            refused[error.reason] += 1
            continue
        if record.fingerprint != hello.fingerprint:
            refused["fingerprint"] += 1
            continue
        outcome = view.apply(record, 0.0, sighting.raw, age_s=sighting.age_s)
        if outcome not in NEWS:
            refused[outcome] += 1
    return sorted(view.live(0.0), key=lambda a: (a.start, a.end, a.peer_id)), refused


async def measure(host: Host, records: Sequence[Announcement]) -> Mapping[str, float]:
    """Round trips in seconds to the peers that answer in time."""
    rtts: dict[str, float] = {}

    limiter = trio.CapacityLimiter(MAX_PROBES)

    async def one(record: Announcement) -> None:
        host.learn(record.peer_id, record.addrs)
        async with limiter:
            try:
                rtts[record.peer_id] = await host.ping(record.peer_id)
            except PeerError:
                return  # shown as unmeasured

    with trio.move_on_after(PROBE_DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(one, record)
    return rtts


def describe_swarm(
    model: str,
    num_blocks: int,
    records: Sequence[Announcement],
    rtts: Mapping[str, float],
    refused: Mapping[str, int],
) -> Swarm:
    """The swarm as seen from here: who a session would use, and why not the others."""
    router, known = Router(num_blocks), Knowledge(rtts=rtts)
    try:
        route = router.find(records, known)
    except NoRoute:
        route = None
    uses = explain(router, records, known, route=route)
    used = {hop.peer_id for hop in route.hops} if route else set()
    return Swarm(
        model=model,
        blocks=num_blocks,
        covered=route is not None,
        peers=[peer_info(a, rtts, uses[a.peer_id]) for a in records],
        not_used=[Unused(a.peer_id, uses[a.peer_id]) for a in records if a.peer_id not in used],
        copies=copies(records, num_blocks),
        refused=dict(refused),
    )


def copies(records: Sequence[Announcement], num_blocks: int) -> list[int]:
    """How many peers serve each block."""
    counts = [0] * num_blocks
    for a in records:
        if a.state == "online":
            for block in range(a.start, min(a.end, num_blocks)):
                counts[block] += 1
    return counts


def peer_info(a: Announcement, rtts: Mapping[str, float], use: str) -> PeerInfo:
    """A peer's record as ``status`` shows it."""
    rtt = rtts.get(a.peer_id)
    return PeerInfo(
        peer_id=a.peer_id,
        name=a.name,
        state=a.state,
        blocks=(a.start, a.end),
        rtt_ms=None if rtt is None else round(rtt * 1000, 3),
        throughput=round(a.decode_tps, 3),
        kv_tokens_free=a.kv_tokens_free,
        quant=a.quant,
        forward=round(a.forward_tps, 3),
        queue_depth=a.queue_depth,
        dtype=a.dtype,
        max_context=a.max_context,
        adapters=a.adapters,
        moving_to=a.moving_to,
        pinned=a.pinned,
        use=use,
    )
