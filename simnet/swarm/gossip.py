"""The epidemic layer of a large swarm, modelled: who hears of what, when, and what that costs.

Messages flood a random mesh, as GossipSub's eager push does: each node passes a message on to its
mesh peers, but not to those that it had the message from. A death is found by the mesh peers of the
dead, whose connections fall silent; they probe, and accuse (``routing.suspicion``, the real code,
one instance a node). How often nodes speak is ``routing.beats``.

Not modelled: loss (links are TCP), the gossip of message ids to peers outside of the mesh, and
probes by those who hear an accusation, which make deaths known sooner.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from random import Random

from petalnode.routing.announcement import Announcement
from petalnode.routing.beats import beat_interval
from petalnode.routing.suspicion import Suspicion, Suspicions
from petalnode.routing.view import SwarmView
from petalnode.simnet.swarm.machines import FINGERPRINT

MESH_DEGREE = 4
"""Mesh peers that each node looks for; it has more, since others look, too."""
LINK_S = (0.005, 0.12)
"""One-way delays of mesh links, evenly."""
PING_S, SILENCE_S = 2.0, 6.0
"""A connection ends ``SILENCE_S`` after the last sign of life; pings come every ``PING_S``."""
PROBE_S = 2.0
"""For a probe of a silent peer to fail."""
SWEEP_S = 2.0
"""How often a node looks whether a suspicion has become certain."""
MESSAGES_A_LIFE = 4
"""Joining, online, draining, goodbye; or, of one that dies, two and its two accusers'."""
WALL = 1e9


@dataclass(frozen=True)
class Costs:
    """What one message costs. ``cpu_s`` is measured: see docs/placement.md."""

    cpu_s: float = 0.0015
    record_bytes: int = 750
    framing_bytes: int = 60


@dataclass(frozen=True)
class Flood:
    """When each node had the message (inf: never), and how many copies were sent in all."""

    heard_at_s: list[float]
    copies: int


class Mesh:
    """A random mesh of ``size`` nodes, in which each looked for ``MESH_DEGREE`` peers."""

    def __init__(self, size: int, rng: Random, cpu_s: float = Costs.cpu_s) -> None:
        self.size = size
        self._cpu_s = cpu_s
        self.links: list[dict[int, float]] = [{} for _ in range(size)]
        for node in range(size):
            while len(self.links[node]) < min(MESH_DEGREE, size - 1):
                other = rng.randrange(size)
                if other != node:
                    delay = rng.uniform(*LINK_S)
                    self.links[node][other] = self.links[other][node] = delay

    def flood(self, source: int, at_s: float = 0.0, without: Collection[int] = ()) -> Flood:
        """One message from ``source``; the nodes in ``without`` neither hear nor pass on."""
        heard = [inf] * self.size
        sender = [-1] * self.size
        queue = [(at_s, source, -1)]
        while queue:
            now, node, by = heappop(queue)
            if heard[node] < inf or node in without:
                continue
            heard[node], sender[node] = now, by
            for other, delay in self.links[node].items():
                if heard[other] == inf:
                    heappush(queue, (now + self._cpu_s + delay, other, node))
        return Flood(heard, self._copies(heard, sender, without))

    def _copies(self, heard: list[float], sender: list[int], without: Collection[int]) -> int:
        """A node sends to each mesh peer from which it has not had the message by then."""
        copies = 0
        for node, links in enumerate(self.links):
            if heard[node] == inf:
                continue
            for other, delay in links.items():
                had = other == sender[node] or heard[other] + delay <= heard[node]
                copies += not had and other not in without
        return copies


@dataclass(frozen=True)
class Spread:
    """Seconds until all views agree, and copies of one message that a node receives."""

    news_s: float
    death_s: float
    copies: float


def spread(size: int, seed: int) -> Spread:
    """How news and one death spread among ``size`` nodes."""
    rng = Random(f"{seed}/gossip/{size}")
    mesh = Mesh(size, rng)
    flood = mesh.flood(rng.randrange(size))
    victim = rng.randrange(size)
    return Spread(max(flood.heard_at_s), death_known_s(mesh, victim, rng), flood.copies / size)


def death_known_s(mesh: Mesh, victim: int, rng: Random) -> float:
    """From a node's death, without a word, until the last view has dropped it."""
    accusers = {
        peer: SILENCE_S + rng.uniform(-PING_S, 0.0) + PROBE_S for peer in mesh.links[victim]
    }
    floods = {peer: mesh.flood(peer, at_s, {victim}) for peer, at_s in accusers.items()}
    records = [_record(peer) for peer in (victim, *accusers)]
    known = [
        _dropped_at(node, victim, records, accusers, floods, rng)
        for node in range(mesh.size)
        if node != victim
    ]
    return max(known)


def _dropped_at(
    node: int,
    victim: int,
    records: Sequence[Announcement],
    accusers: dict[int, float],
    floods: dict[int, Flood],
    rng: Random,
) -> float:
    """When one node drops the victim; its view has only those whom the case is about."""
    if node in accusers:
        return accusers[node]  # its own probe failed
    view = SwarmView()
    for record in records:
        view.apply(record, -100.0, b"")  # long known: they have a voice
    suspicions = Suspicions(_name(node), view)
    heard = sorted((flood.heard_at_s[node], peer) for peer, flood in floods.items())
    now = heard[0][0] + rng.uniform(0.0, SWEEP_S)
    while True:
        while heard and heard[0][0] <= now:
            at, peer = heard.pop(0)
            suspicions.hear(Suspicion(_name(peer), _name(victim), 1, WALL), at)
        if suspicions.dead(now):
            return now
        now += SWEEP_S


@dataclass(frozen=True)
class Load:
    """On each node, a second: messages, bytes received (as many are sent), share of a core."""

    messages: float
    received_bytes: float
    cpu: float


def load(size: int, copies: float, life_s: float = inf, costs: Costs = Costs()) -> Load:
    """What gossip costs in a swarm of ``size``, whose nodes stay ``life_s`` in the mean.

    A life costs ``MESSAGES_A_LIFE``, which all nodes get at once: these grow with the swarm, and
    the beats do not.
    """
    ends = size / life_s * MESSAGES_A_LIFE
    messages = size / beat_interval(size) + ends
    each = costs.record_bytes + costs.framing_bytes
    return Load(messages, messages * copies * each, messages * costs.cpu_s)


def _name(node: int) -> str:
    return f"n{node:05d}"


def _record(node: int) -> Announcement:
    return Announcement(
        peer_id=_name(node),
        name="",
        fingerprint=FINGERPRINT,
        start=0,
        end=1,
        state="online",
        decode_tps=1.0,
        forward_tps=1.0,
        kv_tokens_free=0,
        queue_depth=0,
        dtype="float32",
        max_context=1,
        addrs=(),
        seq=1,
        issued_at=WALL,
        ttl_s=3600.0,
    )
