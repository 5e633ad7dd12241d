"""The span that a node holds: loaded, announced, served, drained, exchanged for another.

``Node`` owns one ``Holding``; ``placing`` tells it which blocks to hold. A holding that is empty, a
client's, announces nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import trio

from petalnode.bandwidth import BandwidthMeter
from petalnode.compute import Compute
from petalnode.errors import ModelError
from petalnode.events import Draining, Moving, Ready, Report
from petalnode.machine import Machine
from petalnode.models.checkpoint import Checkpoint
from petalnode.models.span import Span
from petalnode.models.tuning.tuning import Tuning
from petalnode.p2p.frames import FrameStream
from petalnode.protocol import refusal_wire
from petalnode.routing.announcement import (
    MAX_ADDRS,
    MAX_BANDWIDTH,
    MAX_TPS,
    Announcement,
    State,
)
from petalnode.serving.adapters import Offered, find_offered, load_offered, load_remaining
from petalnode.serving.hop_session import Connect
from petalnode.serving.known_rates import Rates, rates_key
from petalnode.serving.service import SpanService, Throughput, load_service
from petalnode.swarm import Swarm

Blocks = tuple[int, int]

DRAIN_DEADLINE_S = 60.0
"""How long a node that leaves waits for its sessions to end."""
MOVE_DRAIN_S = 30.0
"""How long a node that wants to move waits for that, before it gives the move up."""
GOODBYE_DEADLINE_S = 1.0
MIN_TPS = 1e-3
"""What is announced at least while nothing was measured."""


@dataclass(frozen=True)
class Terms:
    """What is the same for every span that a node may hold."""

    checkpoint: Checkpoint
    peer_id: str
    addrs: tuple[str, ...]
    name: str
    dtype: torch.dtype
    device: torch.device
    quant: str
    kv_tokens: int | None
    replay_log_tokens: int | None
    pinned: bool
    adapters: tuple[str, ...] = ()
    cache_dir: Path | None = None


class Holding:
    """See the module. ``connect`` opens streams to other hops; engines run in ``nursery``."""

    def __init__(
        self,
        terms: Terms,
        swarm: Swarm,
        machine: Machine,
        compute: Compute,
        connect: Connect,
        meter: BandwidthMeter,
        nursery: trio.Nursery,
        report: Report,
    ) -> None:
        self.terms = terms
        self.blocks: Blocks | None = None
        self.service: SpanService | None = None
        self._swarm = swarm
        self._machine = machine
        self._compute = compute
        self._connect = connect
        self._meter = meter
        self._nursery = nursery
        self._report = report
        self._state: State = "joining"
        self._moving_to: Blocks | None = None
        self._offered: tuple[Offered, ...] = ()
        self._seq = int(machine.wall_clock() * 1e6)
        self._engine_scope = trio.CancelScope()
        config, dtype = terms.checkpoint.config, dtype_name(terms.dtype)
        self._rates_key = rates_key(config, terms.device, dtype, terms.quant)

    @property
    def sessions(self) -> int:
        """Open sessions here."""
        return self.service.sessions if self.service else 0

    async def handle(self, stream: FrameStream) -> None:
        """The stream handler of the hop protocol, whatever span is held."""
        if self.service is None:
            await _refuse_loading(stream)
        else:
            await self.service.server.handle(stream)

    async def handle_training(self, stream: FrameStream) -> None:
        """The stream handler of the training protocol."""
        if self.service is None:
            await _refuse_loading(stream)
        else:
            await self.service.training.handle(stream)

    async def intend(self, blocks: Blocks) -> None:
        """Tell the swarm which blocks will be loaded here."""
        first = self.blocks is None
        self.blocks = blocks
        await self._publish("joining")
        if first:  # loading may take longer than a record lives
            self._nursery.start_soon(self._swarm.beat, self.announcement, self._room)

    async def find_adapters(self) -> None:
        """Fetch what this node will offer; before it announces anything, so that who asks for an
        adapter by name can wait for it. Raises ``UsageError`` or ``ModelError``."""
        terms = self.terms
        if terms.adapters:
            config = terms.checkpoint.config
            find = partial(find_offered, terms.adapters, config, terms.cache_dir)
            self._offered = await self._compute.run(find)

    @property
    def adapter_bytes(self) -> int:
        """What these add to one block at most."""
        return sum(one.block_bytes for one in self._offered)

    async def load(self) -> None:
        """Load the blocks that were announced, and serve them. Raises ``ModelError``, or
        ``UsageError`` for an adapter that cannot be offered."""
        assert self.blocks is not None
        await self._serve(self.blocks, None)
        await self._go_online()

    async def move(self, blocks: Blocks) -> bool:
        """Exchange the span for another, without loss to any session; whether that was possible.

        Drains first, and gives up if sessions do not end within ``MOVE_DRAIN_S``. Blocks of both
        spans stay loaded. If the new ones cannot be loaded, the old ones are served again; raises
        ``ModelError`` if not even these can.
        """
        service, before = self.service, self.blocks
        if service is None or before is None:
            return False
        self._report(Moving(before, blocks, self.sessions))
        self._moving_to = blocks
        moved = await self._drain("draining", MOVE_DRAIN_S)
        if moved:
            moved = await self._exchange(service, before, blocks)
        self._moving_to = None
        if self.service is not service:
            await self._go_online()
        else:
            service.server.draining = False
            await self._publish("online")
        return moved

    async def drain(self) -> None:
        """Take no new sessions, tell the swarm, wait until those here end or the deadline."""
        if self.service is None:
            return
        self._report(Draining(self.sessions))
        self._moving_to = None
        await self._drain("draining", DRAIN_DEADLINE_S)

    async def leave(self) -> None:
        """Say goodbye."""
        if self.blocks is None:
            return
        self._moving_to = None
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_DEADLINE_S):
            await self._publish("offline")

    async def _drain(self, state: State, deadline_s: float) -> bool:
        assert self.service is not None
        self.service.server.draining = True
        await self._publish(state)
        with trio.move_on_after(deadline_s):
            await self.service.drain()  # those who are told will not choose us again
            await self.service.wait_idle()
            return True
        return False

    async def _exchange(self, service: SpanService, before: Blocks, blocks: Blocks) -> bool:
        # What does not stay is freed first: a node may have no room for both.
        kept = shared(service.engine.span, blocks)
        service.engine.span, service.server.adapters = kept, {}
        self.blocks = self._moving_to = blocks
        await self._publish("joining")
        try:
            await self._serve(blocks, kept)
        except ModelError:
            self.blocks, self._moving_to = before, None
            await self._serve(before, kept)
            return False
        return True

    async def _serve(self, blocks: Blocks, keep: Span | None) -> None:
        adapters = await self._load_adapters(blocks)  # what is free afterwards is shared out
        service = await load_service(
            self.terms.checkpoint,
            blocks,
            dtype=self.terms.dtype,
            device=self.terms.device,
            quant=self.terms.quant,
            kv_tokens=self.terms.kv_tokens,
            replay_log_tokens=self.terms.replay_log_tokens,
            compute=self._compute,
            connect=self._connect,
            measure=self._machine.measure,
            report=self._report,
            keep=keep,
        )
        service.server.adapters = adapters
        self._engine_scope.cancel()
        self._engine_scope = trio.CancelScope()
        self.service = service
        rates = self.expected_rates()
        if rates is not None:
            self._machine.known_rates.put(self._rates_key, rates)
        self._nursery.start_soon(self._run_engine, service, self._engine_scope)

    async def _load_adapters(self, blocks: Blocks) -> dict[str, Tuning]:
        if not self._offered:
            return {}
        config, device = self.terms.checkpoint.config, self.terms.device
        how = load_offered if self.service is None else load_remaining
        loaded = await self._compute.run(partial(how, self._offered, config, blocks, device))
        # A node that moves goes on without adapters whose files are no longer there.
        self._offered = tuple(one for one in self._offered if one.name in loaded)
        return loaded

    async def _run_engine(self, service: SpanService, scope: trio.CancelScope) -> None:
        with scope:
            await service.engine.serve()

    async def _go_online(self) -> None:
        assert self.service is not None
        assert self.blocks is not None
        await self._publish("online")
        throughput, name = self.service.throughput, self.terms.checkpoint.name
        speeds = {"decode": throughput.decode, "forward": throughput.forward}
        memory = self.service.memory()
        adapters = tuple(one.name for one in self._offered)
        self._report(Ready(self.terms.peer_id, self.blocks, name, speeds, memory, adapters))

    async def _publish(self, state: State) -> None:
        self._state = state
        await self._swarm.publish(self.announcement())

    def announcement(self) -> Announcement:
        """What this node says about itself now; each call takes a new sequence number."""
        assert self.blocks is not None
        self._seq += 1
        terms, service = self.terms, self.service
        throughput = self._throughput()
        return Announcement(
            peer_id=terms.peer_id,
            name=terms.name,
            fingerprint=terms.checkpoint.fingerprint,
            start=self.blocks[0],
            end=self.blocks[1],
            state=self._state,
            decode_tps=throughput.decode,
            forward_tps=throughput.forward,
            kv_tokens_free=self._room(),
            queue_depth=service.engine.queue_depth if service else 0,
            dtype=dtype_name(terms.dtype),
            quant=terms.quant,
            max_context=terms.checkpoint.config.max_positions,
            addrs=terms.addrs[:MAX_ADDRS],
            seq=self._seq,
            issued_at=self._machine.wall_clock(),
            ttl_s=self._swarm.ttl_s,
            rtts=self._swarm.rtts_to_announce(),
            bandwidth=min(self._meter.bytes_per_s, MAX_BANDWIDTH),
            moving_to=self._moving_to,
            pinned=terms.pinned,
            adapters=tuple(one.name for one in self._offered),
        )

    def _room(self) -> int:
        return self.service.budget.tokens_free if self.service else 0

    def expected_rates(self) -> Rates | None:
        """Tokens/s through one block here, as measured now or earlier; else as the others in the
        middle say, None where there are none."""
        if self.service is not None and self.blocks is not None:
            size = self.service.span.end - self.service.span.start
            decode, forward = self.service.throughput.decode, self.service.throughput.forward
            return Rates(decode * size, forward * size)
        known = self._machine.known_rates.get(self._rates_key)
        others = self._swarm.others()
        if known is not None or not others:
            return known
        return Rates(
            median(a.decode_tps * (a.end - a.start) for a in others),
            median(a.forward_tps * (a.end - a.start) for a in others),
        )

    def _throughput(self) -> Throughput:
        if self.service is not None:
            return self.service.throughput
        rates = self.expected_rates()
        if rates is None or self.blocks is None:
            return Throughput()
        size = self.blocks[1] - self.blocks[0]
        # A guess by what others say, or by a file: whatever that was, our own record must be valid.
        decode, forward = (min(max(rate / size, MIN_TPS), MAX_TPS) for rate in rates)
        return Throughput(decode, forward)


async def _refuse_loading(stream: FrameStream) -> None:
    await stream.send(refusal_wire("joining", "this node still loads its blocks"))
    await stream.aclose()


def shared(span: Span, blocks: Blocks) -> Span:
    """The part of a span that lies within other blocks, possibly nothing."""
    inside = range(max(span.start, blocks[0]), min(span.end, blocks[1]))
    loaded = [one for index in inside if (one := span.loaded(index)) is not None]
    return Span(
        span.config, inside.start if loaded else span.start, loaded, span.dtype, span.device
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and so on."""
    return str(dtype).removeprefix("torch.")
