"""A world of real nodes on a simulated network, for tests of what happens when things go wrong.

    async with open_world(7, "demo") as world:
        await world.start("a", blocks=(0, 4))
        client = await world.start("client")
        world.link("a", "client", latency_s=0.05, bandwidth=12.5e6)
        world.at(3.0, lambda: world.kill("a"))

Nodes are what ``open_node`` opens, in one process and in virtual time: the same seed gives the same
``world.digest`` in any process. What stays real is the model's arithmetic; its time is modelled.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from random import Random
from typing import Any

import trio

from petalnode.errors import UsageError
from petalnode.events import Report, ignore
from petalnode.machine import Machine
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.span import Span
from petalnode.node import Node, NodeOptions, open_node
from petalnode.p2p.frames import ByteStream
from petalnode.p2p.identity import Identity, new_identity
from petalnode.serving.service import Throughput
from petalnode.simnet.clock import WALL_EPOCH_S, check_virtual, seeded_scheduler
from petalnode.simnet.compute import Cost, SimCompute
from petalnode.simnet.links import Link, Parcel, Rule
from petalnode.simnet.meter import MeteredStream
from petalnode.simnet.network import Network

PORT = 4001
KV_TOKENS = 4096
LAN_LATENCY_S = 0.0005


@dataclass(eq=False)
class Member:
    """A node's place in the world, which outlives the node. ``slowness`` multiplies its computing
    time, ``skew_s`` is how far its clock is ahead, ``boast`` multiplies the speed it claims."""

    name: str
    identity: Identity
    options: NodeOptions
    contact: str | None
    report: Report
    slowness: float = 1.0
    skew_s: float = 0.0
    boast: float = 1.0
    node: Node | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    leave: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    starts: int = 0


class World:
    """See the module. Made by ``open_world``."""

    def __init__(
        self, seed: int, checkpoint: Checkpoint, network: Network, cost: Cost, nursery: trio.Nursery
    ) -> None:
        self.seed = seed
        self.checkpoint = checkpoint
        self.network = network
        self.trace = network.trace
        self.cost = cost
        self._members: dict[str, Member] = {}
        self._names: dict[str, str] = {}
        self._nursery = nursery

    # Nodes

    async def start(
        self,
        name: str,
        *,
        blocks: tuple[int, int] | None = None,
        join: str | None = None,
        slowness: float = 1.0,
        skew_s: float = 0.0,
        boast: float = 1.0,
        report: Report = ignore,
        **options: Any,
    ) -> Node:
        """A new node, ready. It joins through the node named ``join``, by default the first that
        serves; without ``blocks`` (or ``num_blocks``) it is a client. ``options`` are NodeOptions'.

        Raises what ``open_node`` raises, and ``UsageError`` for a name that is taken.
        """
        if name in self._members:
            raise UsageError(f"There is a node {name!r} already.", "Use restart, or another name.")
        options.setdefault("kv_tokens", KV_TOKENS)
        chosen = NodeOptions(
            blocks=blocks,
            host=self.network.host(name).address,
            port=PORT,
            name=name,
            **options,
        )
        identity = new_identity(sha256(f"{self.seed} identity {name}".encode()).digest())
        member = Member(name, identity, chosen, join, report, slowness, skew_s, boast)
        self._members[name] = member
        self._names[identity.peer_id] = name
        return await self._open(member)

    async def restart(self, name: str) -> Node:
        """The node of that name again, with its identity, address and options, after it ended."""
        member = self._members[name]
        await member.ended.wait()
        member.scope = trio.CancelScope()
        member.leave, member.ended = trio.Event(), trio.Event()
        return await self._open(member)

    async def stop(self, name: str) -> None:
        """Leave as a program does that is told to: with a goodbye."""
        self._members[name].leave.set()
        await self._members[name].ended.wait()

    def kill(self, name: str, *, silent: bool = False) -> None:
        """End a node as SIGKILL does, resetting its connections; ``silent``, as a power cut."""
        self.network.kill(name, silent=silent)
        self._members[name].scope.cancel()

    def slow_down(self, name: str, slowness: float) -> None:
        """From now on its computing takes so many times as long."""
        self._members[name].slowness = slowness

    def peer_id(self, name: str) -> str:
        """The peer id of the node with that name."""
        return self._members[name].identity.peer_id

    def name_of(self, peer_id: str) -> str:
        """The name of the node with that peer id."""
        return self._names[peer_id]

    async def _open(self, member: Member) -> Node:
        self.network.host(member.name).is_up = True
        member.starts += 1
        member.options = replace(member.options, join=self._join(member))
        node: Node = await self._nursery.start(self._run, member, self._machine(member))
        return node

    def _join(self, member: Member) -> tuple[str, ...]:
        """The address of its contact, or of the first other node that serves."""
        others = [m.name for m in self._members.values() if m.options.serves and m.node]
        contact = member.contact or next(iter(others), None)
        if contact is None:
            return ()
        address = self.network.host(contact).address
        return (f"/ip4/{address}/tcp/{PORT}/p2p/{self.peer_id(contact)}",)

    async def _run(self, member: Member, machine: Machine, task_status: Any) -> None:
        """One life of a node; tells its starter when it is ready."""
        try:
            with member.scope:
                async with open_node(
                    self.checkpoint, member.options, member.report, machine=machine
                ) as member.node:
                    task_status.started(member.node)
                    await member.leave.wait()
        finally:
            member.node = None
            member.ended.set()

    def _machine(self, member: Member) -> Machine:
        def count(peer_id: str, protocol: str, size: int) -> None:
            self.trace.count_stream(member.name, self._names[peer_id], protocol, size)

        def tap(stream: ByteStream, protocol: str) -> ByteStream:
            return MeteredStream(stream, protocol, count)

        def measure(span: Span) -> Throughput:
            true = self.cost.throughput(span.end - span.start)
            factor = member.boast / member.slowness
            return Throughput(true.decode * factor, true.forward * factor)

        return Machine(
            transport=self.network.transport(member.name),
            tap=tap,
            compute=lambda: SimCompute(self.cost, lambda: member.slowness),
            measure=measure,
            wall_clock=lambda: WALL_EPOCH_S + trio.current_time() + member.skew_s,
            rng=Random(f"{self.seed} node {member.name} {member.starts}"),
            identity=member.identity,
        )

    # The network

    def link(self, a: str, b: str, *, oneway: bool = False, **changes: float) -> None:
        """Set ``latency_s``, ``jitter_s``, ``bandwidth`` or ``loss``, from ``a`` to ``b`` and,
        unless one way, back."""
        for link in self.network.between(a, b, oneway):
            for name, value in changes.items():
                if name not in ("latency_s", "jitter_s", "bandwidth", "loss"):
                    raise UsageError(
                        f"A link has no {name}.", "See simnet/links.py for what it has."
                    )
                setattr(link, name, value)

    def partition(
        self, a: str, b: str | None = None, *, oneway: bool = False, for_s: float = math.inf
    ) -> None:
        """Nothing crosses between ``a`` and ``b`` (None: everybody) any more, and nobody is told.

        ``oneway``: what ``a`` sends does not arrive, but it hears ``b``. Heals after ``for_s``.
        """
        links = self.network.between(a, b, oneway)
        self.network.set_up(links, False)
        if for_s < math.inf:
            self.at(trio.current_time() + for_s, lambda: self.network.set_up(links, True))

    def heal(self, a: str, b: str | None = None) -> None:
        """End a partition."""
        self.network.set_up(self.network.between(a, b, oneway=False), True)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a virtual time."""
        self.network.post(time_s, action)

    def when(
        self,
        matches: Callable[[Parcel], bool],
        act: Callable[[Parcel], None] | None = None,
        **effect: Any,
    ) -> Rule:
        """Interfere with the next parcel that matches, or the next few: see ``Rule``."""
        rule = Rule(matches, act, **effect)
        self.network.rules.append(rule)
        return rule

    # What was seen

    @property
    def digest(self) -> str:
        """Of everything that the network has carried so far."""
        return self.trace.digest

    def bytes_sent(self, a: str, b: str, protocol: str | None = None) -> int:
        """From ``a`` to ``b``: all that TCP carried, or what streams of one protocol did."""
        if protocol is None:
            return self.trace.link_bytes[a, b]
        return self.trace.stream_bytes[a, b, protocol]


@asynccontextmanager
async def open_world(
    seed: int, model: str | Checkpoint, *, cost: Cost | None = None, **link_defaults: float
) -> AsyncIterator[World]:
    """An empty world, whose nodes share ``model``. ``link_defaults`` are fields of every ``Link``.

    Leaving it kills every node. Raises ``UsageError`` outside virtual time.
    """
    check_virtual()
    link_defaults.setdefault("latency_s", LAN_LATENCY_S)
    network = Network(seed, **link_defaults)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    with seeded_scheduler(seed):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.run)
            yield World(seed, checkpoint, network, cost or Cost(), nursery)
            nursery.cancel_scope.cancel()


__all__ = ["Cost", "Link", "Member", "Parcel", "Rule", "World", "open_world"]
