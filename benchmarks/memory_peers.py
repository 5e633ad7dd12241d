"""Hop servers in one process, over streams in memory, that fail when they are told to.

A server that fails is gone at once with all its streams, as after a SIGKILL; another one of the
same span, with nothing in its caches, stands ready then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from petalnode.compute import ComputeThread
from petalnode.errors import PeerError, PeerUnreachable
from petalnode.events import Recovered
from petalnode.models.checkpoint import Checkpoint
from petalnode.models.loading import load_block_span
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.memory import memory_frame_pair
from petalnode.routing.chain import Gap, Hop
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.server import HopServer

CLIENT = "client"
KV_TOKENS = 1 << 16
"""Of each server, and of its replay logs: far more than a text has."""


@dataclass(eq=False)
class Peer:
    """One server of a span; ``streams`` are those of it that it, or another, opened."""

    name: str
    span: tuple[int, int]
    server: HopServer
    streams: list[FrameStream] = field(default_factory=list)


class MemoryPeers:
    """Servers in this process. With ``logs`` False they remember nothing of what they sent."""

    def __init__(self, checkpoint: Checkpoint, nursery: trio.Nursery, *, logs: bool) -> None:
        self.checkpoint = checkpoint
        self.peers: dict[str, Peer] = {}
        self._nursery = nursery
        self._log_tokens = KV_TOKENS if logs else 0
        self._engines: dict[tuple[int, int], SpanEngine] = {}
        self._computes: dict[tuple[int, int], ComputeThread] = {}
        self._count = 0

    def add(self, span: tuple[int, int]) -> None:
        """One more server of the span. Those of one span share its weights and its thread."""
        if span not in self._engines:
            blocks = load_block_span(self.checkpoint, *span, dtype="float32")
            self._computes[span] = ComputeThread()
            self._engines[span] = SpanEngine(blocks, self._computes[span])
            self._nursery.start_soon(self._engines[span].serve)
        self._count += 1
        name = f"peer {self._count}"
        server = HopServer(
            self._engines[span],
            KvBudget(KV_TOKENS, span[1] - span[0]),
            compute=self._computes[span],
            fingerprint=self.checkpoint.fingerprint,
            connect=partial(self._connect, name),
            log_budget=KvBudget(self._log_tokens, 1),
        )
        self.peers[name] = Peer(name, span, server)

    def fail(self, name: str) -> None:
        """This server is gone, and another stands ready."""
        peer = self.peers.pop(name)
        for stream in peer.streams:
            stream.reset()
        self.add(peer.span)

    def hops(self, start: int, end: int) -> list[Hop]:
        """Servers that cover these blocks, the oldest first."""
        chosen: list[Hop] = []
        while start < end:
            peer = next(p for p in self.peers.values() if p.span[0] <= start < p.span[1])
            chosen.append(Hop(peer.name, start, min(peer.span[1], end)))
            start = peer.span[1]
        return chosen

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """As the client."""
        return await self._connect(CLIENT, peer_id, (), protocol)

    async def _connect(
        self, ours: str, theirs: str, addrs: tuple[str, ...], protocol: str
    ) -> FrameStream:
        if theirs not in self.peers:
            raise PeerUnreachable(f"{theirs} is not there.", peer_id=theirs)
        near, far = memory_frame_pair(ours, theirs)
        for name in (ours, theirs):
            if name in self.peers:
                self.peers[name].streams.append(near)
        self._nursery.start_soon(self._serve, self.peers[theirs], far)
        return near

    async def _serve(self, peer: Peer, stream: FrameStream) -> None:
        with suppress(PeerError):
            await peer.server.handle(stream)
        stream.reset()

    # What a chain asks of whoever finds replacements

    async def find(self, gap: Gap, avoid: Mapping[str, PeerError]) -> Sequence[Hop]:
        """See ``Replacements``."""
        return self.hops(gap.first, gap.last)

    def is_slow(self, hop: Hop, took_s: float) -> bool:
        """See ``Replacements``."""
        return False

    def observe(self, hop: Hop, took_s: float) -> None:
        """See ``Replacements``."""

    def addrs(self, peer_id: str) -> tuple[str, ...]:
        """See ``Replacements``."""
        return ()

    def blame(self, error: PeerError) -> None:
        """See ``Replacements``."""

    def report(self, event: Recovered, hops: Sequence[Hop]) -> None:
        """See ``Replacements``."""
