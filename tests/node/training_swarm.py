"""Real training servers, engines and lines, with memory streams for a network."""

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trio

from petalnode.compute import LIGHT
from petalnode.errors import NoRoute, PeerError, PeerRefused, PeerUnreachable
from petalnode.events import Report, ignore
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.loading import load_block_span
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.memory import memory_frame_pair
from petalnode.serving.engine import SpanEngine
from petalnode.serving.kept import KeptPasses
from petalnode.serving.session_tuning import TuningBudget
from petalnode.serving.training import TrainServer
from petalnode.training.opening import open_training
from petalnode.training.session import Desk, TrainingSession
from petalnode.training.spread import Offer, Stage

FOUR = (("a", 0, 1), ("b", 1, 2), ("c", 2, 3), ("d", 3, 4))
HIDDEN, BLOCKS = 64, 4
DEADLINE_S = 60.0
"""For what happens at once; it only bounds what hangs, as a machine may be busy."""


class Inline:
    """``Compute`` without a thread: so a virtual clock does not run ahead of it."""

    async def run(self, function, load=LIGHT):
        await trio.lowlevel.checkpoint()
        return function()

    def tell(self, call):
        call()


@dataclass
class Peer:
    """One serving peer. ``starts`` has the stages of the jobs that it began."""

    engine: SpanEngine
    server: TrainServer
    draining: bool = False
    starts: list[tuple[str, Stage]] = field(default_factory=list)


class TrainingSwarm:
    """Peers by id. Streams run in ``nursery``; an error in a handler resets its stream."""

    def __init__(self, checkpoint: Checkpoint, nursery: trio.Nursery) -> None:
        self.checkpoint, self._nursery = checkpoint, nursery
        self.peers: dict[str, Peer] = {}
        self.mute: set[str] = set()
        self.speeds: dict[str, float] = {}
        self.failures: list[PeerError] = []
        self.errors: list[Exception] = []
        self.on_start = lambda peer_id, kind, stage: None
        self.changed = trio.Event()
        self._streams: list[tuple[str, FrameStream]] = []
        self._banned: set[str] = set()
        self._compute = Inline()

    def add(
        self, peer_id: str, start: int, end: int, *, max_tokens: int = 2048, **weights: str
    ) -> Peer:
        """A peer that serves blocks [start, end); ``weights``: their dtype and quantization."""
        compute = Inline()
        weights = {"dtype": "float32", **weights}
        kept = KeptPasses()
        span = load_block_span(self.checkpoint, start, end, **weights)
        engine = SpanEngine(span, compute, kept)
        server = TrainServer(
            engine,
            compute,
            fingerprint=self.checkpoint.fingerprint,
            max_tokens=max_tokens,
            is_draining=lambda: peer.draining,
            tunings=TuningBudget(),
            kept=kept,
        )
        peer = self.peers[peer_id] = Peer(engine, server)
        train = engine.train

        async def watched(begin, load):
            def noted(span):
                steps = begin(span)
                note(steps.job.kind, (steps.job.start, steps.job.end))
                return steps

            return await train(noted, load)

        def note(kind, stage):
            peer.starts.append((kind, stage))
            self.on_start(peer_id, kind, stage)

        engine.train = watched
        self._nursery.start_soon(engine.serve)
        self._banned.discard(peer_id)
        self.wake()
        return peer

    def kill(self, peer_id: str) -> None:
        """The peer is gone, with all its streams, as after a SIGKILL."""
        self.peers.pop(peer_id, None)
        for name, stream in self._streams:
            if name == peer_id:
                stream.reset()
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    # What a session needs of a host and of a swarm

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        if peer_id in self.mute:
            raise PeerRefused("It does not speak that.", "", peer_id, "protocol")
        if peer_id not in self.peers:
            raise PeerUnreachable(f"Peer {peer_id} is not there.", peer_id=peer_id)
        ours, theirs = memory_frame_pair("client", peer_id)
        self._streams.append((peer_id, ours))
        self._nursery.start_soon(self._handle, self.peers[peer_id].server, theirs)
        return ours

    def offers(self) -> Sequence[Offer]:
        return [
            Offer(name, peer.engine.span.start, peer.engine.span.end, self.speed(name), 0.001)
            for name, peer in sorted(self.peers.items())
            if name not in self._banned
        ]

    def speed(self, name: str) -> float:
        return self.speeds.get(name, 1e-5)

    def stages(self, span: Stage, tokens: int, avoid: Collection[str]) -> set[Stage]:
        """The widest peers from the first block on, and again without them."""
        stages: set[Stage] = set()
        taken = set(avoid)
        while True:
            at, used = span[0], []
            while at < span[1]:
                fits = [o for o in self.offers() if o.start <= at < o.end]
                fits = [o for o in fits if o.peer_id not in taken]
                if not fits:
                    break
                offer = max(fits, key=lambda o: (o.end, o.peer_id))
                used.append((offer.peer_id, (at, min(offer.end, span[1]))))
                at = min(offer.end, span[1])
            if at < span[1]:
                break
            stages |= {stage for _, stage in used}
            taken |= {peer_id for peer_id, _ in used}
        if not stages:
            raise NoRoute(f"Block {at} is served by nobody.", "Start a node.", (at,))
        return stages

    async def wait_changed(self) -> None:
        await self.changed.wait()

    def failed(self, error: PeerError) -> None:
        self.failures.append(error)
        if not isinstance(error, PeerRefused):
            self._banned.add(error.peer_id)
            self.wake()

    def worked(self, peer_id, blocks, seconds_per_token, kind) -> None:
        assert seconds_per_token >= 0

    @asynccontextmanager
    async def training(
        self, start: int = 0, end: int = BLOCKS, report: Report = ignore
    ) -> AsyncIterator[TrainingSession]:
        """A client's session."""
        desk = Desk(self.checkpoint.config, self._compute)
        fingerprint = self.checkpoint.fingerprint
        async with open_training(self, fingerprint, self, desk, (start, end), report) as session:
            yield session

    async def _handle(self, server: TrainServer, stream: FrameStream) -> None:
        try:
            await server.handle(stream)
            await stream.aclose()
        except (PeerError, trio.TooSlowError) as error:
            self.errors.append(error)
            stream.reset()


@asynccontextmanager
async def open_training_swarm(
    path: Path | str, spans: Sequence[tuple[str, int, int]] = ()
) -> AsyncIterator[TrainingSwarm]:
    """A swarm of ``(peer, start, end)`` servers of one checkpoint."""
    async with trio.open_nursery() as nursery:
        swarm = TrainingSwarm(open_checkpoint(str(path)), nursery)
        for span in spans:
            swarm.add(*span)
        yield swarm
        nursery.cancel_scope.cancel()


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Random ones, the same for the same seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tuning(seed: int = 1, rank: int = 2, prompt: int = 3) -> Tuning:
    """For all blocks of the tiny Llama: two sites and a prompt."""
    blocks = {}
    for index in range(BLOCKS):
        at = 10 * (seed + index)
        lora = {
            "self_attn.q_proj": LowRank(
                numbers(rank, HIDDEN, seed=at, scale=0.1), numbers(HIDDEN, rank, seed=at + 1), 0.5
            ),
            "mlp.down_proj": LowRank(
                numbers(rank, 96, seed=at + 2, scale=0.1), numbers(HIDDEN, rank, seed=at + 3), 1.0
            ),
        }
        blocks[index] = BlockTuning(lora, numbers(prompt, HIDDEN, seed=at + 4))
    return Tuning(blocks)


def at_once(checkpoint, hidden, lengths, grad, added=NOTHING, span=(0, BLOCKS), **weights):
    """Output, gradient of the input, gradients of the tuning: all blocks and rows here, at once."""
    weights = {"dtype": "float32", **weights}
    loaded = load_block_span(open_checkpoint(str(checkpoint)), 0, BLOCKS, **weights)
    forward = ForwardPass(loaded, *span, hidden, lengths, added, keep=True)
    backward = BackwardPass(forward, grad)
    while backward.steps_left:
        backward.step()
    return forward.output, backward.grad, backward.tuning_grads


def error_of(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative."""
    return float((one - other).norm() / other.norm())
