"""Looking at a swarm from outside: what ``petalnode status`` shows. Loads no model and no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

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
from petalnode.routing.chain import choose_chain

PROBE_DEADLINE_S = 3.0


async def survey_swarm(joins: Sequence[Invite | str], fingerprint: str | None) -> Swarm:
    """Ask the first contact that answers for its records, and measure the way to each peer.

    Raises ``SwarmMismatch`` or ``PeerUnreachable``.
    """
    async with open_host(new_identity(), listen=()) as host:
        hello = await contact_swarm(host, joins, network=None, fingerprint=fingerprint)
        records = list(valid_records(hello, time.time()))
        rtts = await measure(host, records)
    return describe_swarm(hello.model, hello.blocks, records, rtts)


def valid_records(hello: Hello, wall_now: float) -> Iterator[Announcement]:
    """What a contact said about its swarm, as far as it is signed, fresh, and of that swarm."""
    for sighting in hello.records:
        try:
            record = unseal(sighting.raw)
            check_clock(record, wall_now)
        except InvalidAnnouncement:
            continue
        if record.fingerprint == hello.fingerprint and record.end <= hello.blocks:
            yield record


async def measure(host: Host, records: Sequence[Announcement]) -> Mapping[str, float]:
    """Round trips in seconds to the peers that answer in time."""
    rtts: dict[str, float] = {}

    async def one(record: Announcement) -> None:
        host.learn(record.peer_id, record.addrs)
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
    model: str, num_blocks: int, records: Sequence[Announcement], rtts: Mapping[str, float]
) -> Swarm:
    """The swarm as seen from here: who a session would use, and why not the others."""
    try:
        used = {hop.peer_id for hop in choose_chain(records, num_blocks, rtts=rtts)}
        covered, why = True, "other peers make a shorter chain"
    except NoRoute as none:
        used, covered, why = set(), False, none.cause
    return Swarm(
        model=model,
        blocks=num_blocks,
        covered=covered,
        peers=[peer_info(a, rtts) for a in records],
        not_used=[
            Unused(a.peer_id, why if a.state == "online" else f"it is {a.state}")
            for a in records
            if a.peer_id not in used
        ],
    )


def peer_info(a: Announcement, rtts: Mapping[str, float]) -> PeerInfo:
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
    )
