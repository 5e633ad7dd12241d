"""A simulated network of hosts: dialling, delivery in virtual time, partitions, deaths.

``Network.transport(name)`` is what the host of that name dials and listens with. One task,
``Network.run``, delivers what is due. Every number is in seconds and bytes.
"""

from __future__ import annotations

import errno
import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import trio

from petalnode.p2p.wire import LISTEN_BACKLOG
from petalnode.simnet.links import SEGMENT_BYTES, Link, Parcel, Rule
from petalnode.simnet.trace import Trace
from petalnode.simnet.wires import Segment, SimWire

RETRANSMIT_S = 0.2
MAX_RETRANSMIT_S = 120.0
DIAL_RETRY_S = 1.0
FAST_RETRANSMIT_SEGMENTS = 4
FIRST_PORT = 49152


@dataclass(eq=False)
class SimHost:
    """A machine. ``is_up`` False is a machine without power: it does not even refuse."""

    name: str
    address: str
    is_up: bool = True
    listening: dict[int, SimListening] = field(default_factory=dict)
    wires: dict[SimWire, None] = field(default_factory=dict)
    next_port: int = FIRST_PORT
    deaths: int = 0

    def take_port(self) -> int:
        """A port that was not used before."""
        self.next_port += 1
        return self.next_port


class Network:
    """Hosts, links and what is under way between them. ``defaults`` are fields of ``Link``."""

    def __init__(self, seed: int, **defaults: Any) -> None:
        self.trace = Trace()
        self.rules: list[Rule] = []
        self._seed = seed
        self._defaults = defaults
        self._hosts: dict[str, SimHost] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._alarm = trio.CancelScope()

    # Hosts and links

    def host(self, name: str) -> SimHost:
        """The host of that name, made when first named."""
        if name not in self._hosts:
            high, low = divmod(len(self._hosts) + 1, 250)
            self._hosts[name] = SimHost(name, f"10.0.{high}.{low + 1}")
        return self._hosts[name]

    def host_at(self, address: str) -> SimHost:
        """The host with that IP address. Raises OSError."""
        for host in self._hosts.values():
            if host.address == address:
                return host
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    def link(self, source: str, target: str) -> Link:
        """One direction between two hosts, made when first named."""
        key = (source, target)
        if key not in self._links:
            rng = Random(f"{self._seed} link {source}>{target}")
            self._links[key] = Link(source, target, rng, **self._defaults)
        return self._links[key]

    def is_up(self, name: str) -> bool:
        """See ``Carrier``."""
        return self.host(name).is_up

    def transport(self, name: str) -> SimTransport:
        """How the host of that name reaches others."""
        return SimTransport(self, self.host(name))

    # Time

    def post(self, at: float, action: Callable[[], None]) -> None:
        """Call ``action`` at virtual time ``at``, in the order of posting where times are equal."""
        self._count += 1
        heapq.heappush(self._due, (at, self._count, action))
        self._alarm.deadline = min(self._alarm.deadline, at)

    async def run(self) -> None:
        """Deliver what is due, for ever."""
        while True:
            deadline = self._due[0][0] if self._due else math.inf
            with trio.CancelScope(deadline=deadline) as self._alarm:
                await trio.sleep_forever()
            while self._due and self._due[0][0] <= trio.current_time():
                heapq.heappop(self._due)[2]()

    # Connections

    def carry(self, wire: SimWire, segment: Segment) -> None:
        """See ``Carrier``."""
        if wire.cut:
            return  # a rule killed the host between two segments
        wire.waiting.append(segment)
        if len(wire.waiting) == 1:
            self._send_waiting(wire, RETRANSMIT_S)

    def _send_waiting(self, wire: SimWire, patience_s: float) -> None:
        """Send in order until one is lost, which holds up the rest until it is sent again."""
        link, now = wire.link, trio.current_time()
        while wire.waiting:
            segment = wire.waiting[0]
            lost, delay_s = self._judge(link, segment.size, now)
            if wire.cut or not wire.waiting:
                return  # a rule has just killed the host
            if lost or link.loses(segment.size):
                self.trace.note(now, "lose", link.source, link.target, segment.size)
                wait_s = self._recovery_s(link, segment.size, patience_s)
                again_s = min(2 * patience_s, MAX_RETRANSMIT_S)
                self.post(now + wait_s, partial(self._send_waiting, wire, again_s))
                return
            wire.waiting.popleft()
            wire.last_arrival = max(link.arrival(segment.size, now) + delay_s, wire.last_arrival)
            self.trace.note(now, segment.kind, link.source, link.target, segment.size)
            self.post(wire.last_arrival, segment.arrive)

    def _recovery_s(self, link: Link, size: int, patience_s: float) -> float:
        """When TCP sends again: after a round trip if more segments arrived, else a time-out."""
        round_trip_s = link.latency_s + self.link(link.target, link.source).latency_s
        if link.is_up and size >= FAST_RETRANSMIT_SEGMENTS * SEGMENT_BYTES:
            return round_trip_s
        return max(patience_s, round_trip_s)

    def _judge(self, link: Link, size: int, now: float) -> tuple[bool, float]:
        """What the rules say: whether it is lost, and how much later it comes."""
        if not self.rules:
            return False, 0.0
        total = self.trace.link_bytes[link.source, link.target]
        parcel = Parcel(now, link.source, link.target, size, total)
        lost, delay_s = False, 0.0
        self.rules = [rule for rule in self.rules if now < rule.until]
        for rule in [rule for rule in self.rules if rule.matches(parcel)]:
            rule.times -= 1
            lost, delay_s = lost or rule.lose, delay_s + rule.delay_s
            if rule.act is not None:
                rule.act(parcel)
        self.rules = [rule for rule in self.rules if not rule.is_over]
        return lost, delay_s

    def send_reset(self, wire: SimWire) -> None:
        """See ``Carrier``. A reset that is lost is not repeated."""
        if wire.link.is_up:
            now = trio.current_time()
            self.trace.note(now, "reset", wire.link.source, wire.link.target)
            at = max(now + wire.link.latency_s, wire.last_arrival)
            self.post(at, wire.other.hear_reset)

    def join_wires(self, dialler: SimHost, listener: SimHost, port: int) -> tuple[SimWire, SimWire]:
        """The two ends of a new connection."""
        near = SimWire(self, self.link(dialler.name, listener.name), (listener.address, port))
        back = self.link(listener.name, dialler.name)
        far = SimWire(self, back, (dialler.address, dialler.take_port()))
        near.other, far.other = far, near
        for host, wire in ((dialler, near), (listener, far)):
            host.wires = {known: None for known in host.wires if not known.closed}
            host.wires[wire] = None
        return near, far

    # Disasters

    def set_up(self, links: Iterable[Link], is_up: bool) -> None:
        """Take links down, or bring them back."""
        for link in links:
            link.is_up = is_up
            self.trace.note(
                trio.current_time(), "up" if is_up else "down", link.source, link.target
            )
            for wire in self.host(link.source).wires:
                if is_up and wire.link is link:
                    wire.acknowledge()

    def between(self, a: str, b: str | None, oneway: bool) -> list[Link]:
        """The links from ``a`` to ``b`` and, unless one way, back; ``b`` None is everybody."""
        others = [b] if b is not None else [name for name in self._hosts if name != a]
        links = [self.link(a, other) for other in others]
        return links if oneway else links + [self.link(other, a) for other in others]

    def kill(self, name: str, *, silent: bool) -> None:
        """The host's program ends at once. Its machine resets the connections, or, ``silent``, is
        off itself, so that nobody is told anything."""
        host = self.host(name)
        self.trace.note(trio.current_time(), "silence" if silent else "kill", name, name)
        host.is_up = not silent
        host.deaths += 1
        host.listening.clear()
        for wire in host.wires:
            if not wire.closed and not silent:
                self.send_reset(wire)
            wire.cut_off()
        host.wires.clear()


class SimListening:
    """``Listening`` on a simulated host."""

    def __init__(self, host: SimHost, port: int) -> None:
        self.address = (host.address, port)
        self._host = host
        self._accepted, self._arriving = trio.open_memory_channel[SimWire](LISTEN_BACKLOG)

    async def accept(self) -> SimWire:
        """See ``Listening``."""
        try:
            return await self._arriving.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None

    def arrive(self, wire: SimWire) -> None:
        """A connection is there to be accepted, if anybody still listens."""
        try:
            self._accepted.send_nowait(wire)
        except (trio.ClosedResourceError, trio.WouldBlock):
            wire.close()

    def close(self) -> None:
        """See ``Listening``."""
        if self._host.listening.get(self.address[1]) is self:
            del self._host.listening[self.address[1]]
        self._accepted.close()


class SimTransport:
    """``Transport`` of one life of a simulated host."""

    def __init__(self, network: Network, host: SimHost) -> None:
        self._network = network
        self._host = host
        self._deaths = host.deaths

    async def dial(self, host: str, port: int) -> SimWire:
        """See ``Transport``. A machine that is off, or partitioned away, never answers."""
        target = self._network.host_at(host)
        await self._cross(self._network.link(self._host.name, target.name))
        if not target.is_up:
            await trio.sleep_forever()
        listening = target.listening.get(port)
        await self._cross(self._network.link(target.name, self._host.name))
        if self._host.deaths != self._deaths:
            await trio.sleep_forever()  # the dialler died while the answer came
        if listening is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        near, far = self._network.join_wires(self._host, target, port)
        self._network.carry(near, Segment("open", 0, lambda: listening.arrive(far)))
        return near

    async def _cross(self, link: Link) -> None:
        """Until a packet of the handshake has come through."""
        wait_s = DIAL_RETRY_S
        while link.loses(1):
            await trio.sleep(wait_s)
            wait_s *= 2
        await trio.sleep_until(link.arrival(0, trio.current_time()))

    def listen(self, host: str, port: int) -> SimListening:
        """See ``Transport``."""
        if host != self._host.address:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        port = port or self._host.take_port()
        if port in self._host.listening:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        listening = SimListening(self._host, port)
        self._host.listening[port] = listening
        return listening
