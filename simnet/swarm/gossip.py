"""The epidemic layer of a large swarm, modelled: who hears of what, when, and what that costs.

Messages flood a random mesh as ``p2p.mesh`` passes them on. Pushed, a node sends a message to all
of its mesh peers but those that it had it from. Offered, it names it to them with its next beat,
and each asks the first who offers. A death is found by the mesh peers of the dead, whose
connections fall silent; they probe, and accuse (``routing.suspicion``, the real code, one instance
a node). How often nodes speak is ``routing.beats``, how much of that is pushed ``p2p.gossip``'s
budget.

Not modelled: loss (links are TCP), offers to peers outside of the mesh, and probes by those who
hear an accusation, which make deaths known sooner.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf
from random import Random

from petalnode.p2p.gossip import PUSHES_PER_S
from petalnode.p2p.mesh import DEGREE, DEGREE_HIGH, DEGREE_LOW, HEARTBEAT_S
from petalnode.routing.announcement import Announcement
from petalnode.routing.beats import beat_interval
from petalnode.routing.suspicion import WITNESSES, Suspicion, Suspicions
from petalnode.routing.view import SwarmView
from petalnode.simnet.swarm.machines import FINGERPRINT

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
_MOST_RPCS = 3 * DEGREE + 1
"""That a node sends in one beat, however much there is: an offer, a question and an answer to each
mesh peer, and an offer to one more."""


@dataclass(frozen=True)
class Costs:
    """What gossip costs a node; ``python -m benchmarks gossip`` measures and prints each.

    ``message_bytes`` is one record as GossipSub carries it, ``id_bytes`` one id in an offer or a
    question, ``rpc_bytes`` what comes to each RPC (topic, yamux, Noise, TCP and IP headers).
    ``cpu_s`` is for a message that is new, ``copy_cpu_s`` for reading an RPC that brings nothing
    new, and is taken for all that are sent and received.
    """

    cpu_s: float = 0.0007
    copy_cpu_s: float = 0.0001
    message_bytes: int = 570
    id_bytes: int = 14
    rpc_bytes: int = 116


@dataclass(frozen=True)
class Flood:
    """When each node had the message (inf: never), how many copies and ids were sent in all."""

    heard_at_s: list[float]
    copies: int
    ids: int = 0


class Mesh:
    """A random mesh of ``size`` nodes: who has fewer than ``DEGREE_LOW`` peers takes more, up to
    ``DEGREE``, of those with fewer than ``DEGREE_HIGH``."""

    def __init__(self, size: int, rng: Random, cpu_s: float = Costs.cpu_s) -> None:
        self.size = size
        self._cpu_s = cpu_s
        self.links: list[dict[int, float]] = [{} for _ in range(size)]
        self._beats = [rng.uniform(0.0, HEARTBEAT_S) for _ in range(size)]
        for node in rng.sample(range(size), size):
            if len(self.links[node]) < min(DEGREE_LOW, size - 1):
                self._graft(node, rng)

    def _graft(self, node: int, rng: Random) -> None:
        while len(self.links[node]) < min(DEGREE, self.size - 1):
            other = rng.randrange(self.size)
            if other != node and len(self.links[other]) < DEGREE_HIGH:
                delay = rng.uniform(*LINK_S)
                self.links[node][other] = self.links[other][node] = delay

    def push(self, source: int, at_s: float = 0.0, without: Collection[int] = ()) -> Flood:
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

    def offer(self, source: int, at_s: float = 0.0, without: Collection[int] = ()) -> Flood:
        """The same by ids: offered with a beat, asked for at once, and sent."""
        heard = [inf] * self.size
        holders: list[set[int]] = [set() for _ in range(self.size)]  # as each node knows
        heard[source] = at_s
        queue = [(self._next_beat(source, at_s), source, source)]
        copies = ids = 0
        while queue:
            now, node, by = heappop(queue)
            if node == by:  # its beat
                for other in self.links[node].keys() - holders[node]:
                    ids += 1
                    heappush(queue, (now + self.links[node][other], other, node))
                continue
            holders[node].add(by)
            if heard[node] == inf and node not in without:
                copies, ids = copies + 1, ids + 1
                heard[node] = now + 2 * self.links[node][by] + self._cpu_s
                heappush(queue, (self._next_beat(node, heard[node]), node, node))
        return Flood(heard, copies, ids)

    def _next_beat(self, node: int, after_s: float) -> float:
        phase = self._beats[node]
        return phase + HEARTBEAT_S * ceil((after_s - phase) / HEARTBEAT_S)

    def flood(self, source: int, at_s: float, without: Collection[int], *, pushed: bool) -> Flood:
        """Either."""
        return (self.push if pushed else self.offer)(source, at_s, without)


@dataclass(frozen=True)
class Spread:
    """Seconds until all views agree, and what one message costs a node: copies, ids."""

    news_s: float
    death_s: float
    copies: float
    ids: float


def spread(size: int, seed: int, *, pushed: bool) -> Spread:
    """How news and one death spread among ``size`` nodes."""
    rng = Random(f"{seed}/gossip/{size}")
    mesh = Mesh(size, rng)
    flood = mesh.flood(rng.randrange(size), rng.random(), (), pushed=pushed)
    victim = rng.randrange(size)
    death_s = death_known_s(mesh, victim, rng, pushed=pushed)
    news_s = max(flood.heard_at_s) - min(flood.heard_at_s)
    return Spread(news_s, death_s, flood.copies / size, flood.ids / size)


def death_known_s(mesh: Mesh, victim: int, rng: Random, *, pushed: bool) -> float:
    """From a node's death, without a word, until the last view has dropped it."""
    accusers = {
        peer: SILENCE_S + rng.uniform(-PING_S, 0.0) + PROBE_S for peer in mesh.links[victim]
    }
    first = sorted(accusers, key=accusers.__getitem__)[:WITNESSES]  # the others hear of these
    floods = {p: mesh.flood(p, accusers[p], {victim}, pushed=pushed) for p in first}
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
    """On each node, a second: messages, bytes sent and received together, share of a core."""

    messages: float
    bytes: float
    cpu: float


def load(
    size: int, pushed: Spread, offered: Spread, life_s: float = inf, costs: Costs = Costs()
) -> Load:
    """What gossip costs in a swarm of ``size``, whose nodes stay ``life_s`` in the mean.

    A life costs ``MESSAGES_A_LIFE``, which all nodes get: these grow with the swarm, and the beats
    do not.
    """
    messages = size / beat_interval(size) + size / life_s * MESSAGES_A_LIFE
    pushes = min(PUSHES_PER_S, messages)
    offers = messages - pushes
    rpcs = pushes * pushed.copies + min(
        offers * (offered.ids + offered.copies), _MOST_RPCS / HEARTBEAT_S
    )
    copies = pushes * pushed.copies + offers * offered.copies
    one_way = (
        copies * costs.message_bytes
        + offers * offered.ids * costs.id_bytes
        + rpcs * costs.rpc_bytes
    )
    cpu = messages * costs.cpu_s + 2 * rpcs * costs.copy_cpu_s
    return Load(messages, 2 * one_way, cpu)


def longest_life_over(
    size: int, pushed: Spread, offered: Spread, bytes_limit: float, costs: Costs = Costs()
) -> float:
    """The mean stay of nodes, in seconds, below which a swarm costs more than ``bytes_limit``."""
    low, high = 1.0, 1e7
    for _ in range(60):
        life_s = (low * high) ** 0.5
        if load(size, pushed, offered, life_s, costs).bytes > bytes_limit:
            low = life_s
        else:
            high = life_s
    return high


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
