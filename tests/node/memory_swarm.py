"""Real hop servers, engines and chains, with memory streams for a network."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trio

from petalnode.compute import ComputeThread
from petalnode.errors import PeerError, PeerUnreachable
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.memory import memory_frame_pair
from petalnode.replay import Source
from petalnode.routing.chain import Hop
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.server import HopServer
from petalnode.session.chain import Chain, ChainSetup, open_chain
from petalnode.session.recovery import Replacements
from petalnode.session.session import IdsSource, Session
from petalnode.session.soft_prompt import PromptedClient


@dataclass
class Server:
    """One serving peer."""

    peer_id: str
    engine: SpanEngine
    budget: KvBudget
    server: HopServer


class MemorySwarm:
    """Peers by id. Streams run in ``nursery``; an error in a handler resets its stream."""

    def __init__(self, checkpoint: Checkpoint, nursery: trio.Nursery) -> None:
        self.checkpoint = checkpoint
        self.servers: dict[str, Server] = {}
        self.errors: list[Exception] = []
        self.cut: set[tuple[str, str]] = set()
        self._open: list[tuple[str, str, FrameStream]] = []
        self._nursery = nursery
        self.client = load_client(checkpoint, dtype="float32")
        self.compute = ComputeThread()

    def add(self, peer_id: str, start: int, end: int, *, kv_tokens: int = 100_000) -> Server:
        """A peer that serves blocks [start, end)."""

        async def connect(other: str, addrs: tuple[str, ...], protocol: str) -> FrameStream:
            return self.dial(peer_id, other)

        span = load_block_span(self.checkpoint, start, end, dtype="float32")
        compute, budget = ComputeThread(), KvBudget(kv_tokens, end - start)
        engine = SpanEngine(span, compute)
        fingerprint = self.checkpoint.fingerprint
        hop_server = HopServer(
            engine, budget, compute=compute, fingerprint=fingerprint, connect=connect
        )
        self.servers[peer_id] = Server(peer_id, engine, budget, hop_server)
        self._nursery.start_soon(engine.serve)
        return self.servers[peer_id]

    def dial(self, from_peer: str, to_peer: str) -> FrameStream:
        """A stream between two peers."""
        if to_peer not in self.servers:
            raise PeerUnreachable(f"Peer {to_peer} is not there.", peer_id=to_peer)
        if (from_peer, to_peer) in self.cut:
            raise PeerUnreachable(f"Peer {to_peer} does not answer.", peer_id=to_peer)
        ours, theirs = memory_frame_pair(from_peer, to_peer)
        self._open.append((from_peer, to_peer, ours))
        self._nursery.start_soon(self._handle, self.servers[to_peer].server, theirs)
        return ours

    def kill(self, peer_id: str) -> None:
        """The peer is gone, with all its streams, as after a SIGKILL."""
        self.servers.pop(peer_id, None)
        self.reset_streams(lambda a, b: peer_id in (a, b))

    def part(self, from_peer: str, to_peer: str) -> None:
        """These two do not reach each other any more."""
        self.cut |= {(from_peer, to_peer), (to_peer, from_peer)}
        self.reset_streams(lambda a, b: {a, b} == {from_peer, to_peer})

    def reset_streams(self, which: Callable[[str, str], bool]) -> None:
        """Reset the streams between some peers."""
        for stream in [s for a, b, s in self._open if which(a, b)]:
            stream.reset()
        self._open = [entry for entry in self._open if not which(*entry[:2])]

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """As a client of this swarm."""
        return self.dial("client", peer_id)

    @asynccontextmanager
    async def chain(
        self,
        *hops: tuple[str, int, int],
        rows: int = 1,
        source: Source | None = None,
        replacements: Replacements | None = None,
        adapter: str = "",
        tuning: Tuning = NOTHING,
    ) -> AsyncIterator[Chain]:
        """An open chain over ``(peer, start, end)`` hops."""
        setup = ChainSetup(
            self,
            "client",
            self.checkpoint.fingerprint,
            self.checkpoint.config.hidden_size,
            rows,
            source=source,
            replacements=replacements,
            adapter=adapter,
            tuning=tuning,
        )
        async with open_chain(setup, [Hop(*hop) for hop in hops]) as chain:
            yield chain

    @asynccontextmanager
    async def session(
        self,
        *hops: tuple[str, int, int],
        rows: int = 1,
        replacements: Replacements | None = None,
        soft_prompt: torch.Tensor | None = None,
        **added: Any,
    ) -> AsyncIterator[Session]:
        """A session over a chain of such hops; ``added`` is its ``adapter`` or ``tuning``."""
        client = self.client
        if soft_prompt is not None:
            client = PromptedClient(client, soft_prompt)
        source = IdsSource(client, self.compute, rows)
        opening = self.chain(*hops, rows=rows, source=source, replacements=replacements, **added)
        async with opening as chain:
            yield Session(chain, source, self.checkpoint.tokenizer(), self.compute)

    async def _handle(self, server: HopServer, stream: FrameStream) -> None:
        try:
            await server.handle(stream)
            await stream.aclose()
        except (PeerError, trio.TooSlowError) as error:
            self.errors.append(error)
            stream.reset()


@asynccontextmanager
async def open_memory_swarm(
    path: Path | str, spans: Sequence[tuple[str, int, int]] = ()
) -> AsyncIterator[MemorySwarm]:
    """A swarm of ``(peer, start, end)`` servers of one checkpoint."""
    async with trio.open_nursery() as nursery:
        swarm = MemorySwarm(open_checkpoint(str(path)), nursery)
        for span in spans:
            swarm.add(*span)
        yield swarm
        nursery.cancel_scope.cancel()
