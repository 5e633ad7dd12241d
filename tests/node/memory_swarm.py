"""Real hop servers, engines and chains, with memory streams for a network."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from petalnode.compute import ComputeThread
from petalnode.errors import PeerError, PeerUnreachable
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.memory import memory_frame_pair
from petalnode.routing.chain import Hop
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.server import HopServer
from petalnode.session.chain import Chain, open_chain
from petalnode.session.session import Session


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
        self._nursery = nursery
        self.client = load_client(checkpoint, dtype="float32")
        self.compute = ComputeThread()

    def add(self, peer_id: str, start: int, end: int, *, kv_tokens: int = 100_000) -> Server:
        """A peer that serves blocks [start, end)."""

        async def connect(other: str, addrs: tuple[str, ...], protocol: str) -> FrameStream:
            return self.dial(peer_id, other)

        span = load_block_span(self.checkpoint, start, end, dtype="float32")
        engine = SpanEngine(span, ComputeThread())
        budget = KvBudget(kv_tokens, end - start)
        hop_server = HopServer(
            engine, budget, fingerprint=self.checkpoint.fingerprint, connect=connect
        )
        self.servers[peer_id] = Server(peer_id, engine, budget, hop_server)
        self._nursery.start_soon(engine.serve)
        return self.servers[peer_id]

    def dial(self, from_peer: str, to_peer: str) -> FrameStream:
        """A stream between two peers."""
        if to_peer not in self.servers:
            raise PeerUnreachable(f"Peer {to_peer} is not there.", peer_id=to_peer)
        ours, theirs = memory_frame_pair(from_peer, to_peer)
        self._nursery.start_soon(self._handle, self.servers[to_peer].server, theirs)
        return ours

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """As a client of this swarm."""
        return self.dial("client", peer_id)

    @asynccontextmanager
    async def chain(self, *hops: tuple[str, int, int], rows: int = 1) -> AsyncIterator[Chain]:
        """An open chain over ``(peer, start, end)`` hops."""
        async with open_chain(
            self,
            [Hop(*hop) for hop in hops],
            fingerprint=self.checkpoint.fingerprint,
            hidden_size=self.checkpoint.config.hidden_size,
            rows=rows,
        ) as chain:
            yield chain

    @asynccontextmanager
    async def session(self, *hops: tuple[str, int, int]) -> AsyncIterator[Session]:
        """A session over a chain of such hops."""
        async with self.chain(*hops) as chain:
            yield Session(chain, self.client, self.checkpoint.tokenizer(), self.compute)

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
