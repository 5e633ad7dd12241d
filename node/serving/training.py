"""Serves the training protocol: other people's forward and backward passes through our blocks.

Task tree: the stream's handler task owns the session and reads. In its nursery run one task for
each of its few jobs, one that says that this node is alive, and one that watches for the client's
leaving. Jobs wait in the span engine, behind all decoding and prefill. When the stream ends,
everything that the session held is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from petalnode.compute import Compute
from petalnode.errors import PeerError
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import BadMessage, refusal_wire
from petalnode.serving.engine import SpanEngine
from petalnode.serving.kept import KeptPasses
from petalnode.serving.rows import Refusal
from petalnode.serving.server import TELL_DEADLINE_S, welcome
from petalnode.serving.session_tuning import TuningBudget
from petalnode.serving.train_session import Room, TrainSession
from petalnode.training.protocol import MAX_FRAME_BYTES, OpenTraining

MAX_SESSIONS = 64
MAX_SESSIONS_PER_PEER = 8
MAX_HELD_BYTES = 1 << 29
"""Of hidden states and gradients, in the jobs of all sessions: what is more waits to be read."""


class TrainServer:
    """The training sessions of one node. ``handle`` is the handler of ``TRAIN_PROTOCOL``.

    A job may have ``max_tokens`` tokens; ``tunings`` and ``kept`` are the node's room for what
    clients add to the blocks, and for passes whose backward may come. While the node
    ``is_draining`` it takes no new sessions.
    """

    def __init__(
        self,
        engine: SpanEngine,
        compute: Compute,
        *,
        fingerprint: str,
        max_tokens: int,
        is_draining: Callable[[], bool],
        tunings: TuningBudget,
        kept: KeptPasses,
    ) -> None:
        self._engine, self._compute = engine, compute
        self._fingerprint, self._max_tokens = fingerprint, max_tokens
        self._is_draining = is_draining
        self._tunings, self._kept = tunings, kept
        self._room = Room(MAX_HELD_BYTES)
        self._sessions: list[TrainSession] = []
        self._ended = trio.Event()

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    async def drain(self) -> None:
        """Tell the clients to go elsewhere; jobs that are here are computed."""
        for session in list(self._sessions):
            with trio.move_on_after(TELL_DEADLINE_S), suppress(PeerError):
                await session.say_draining()

    async def wait_idle(self) -> None:
        """Until no session is open."""
        while self._sessions:
            await self._ended.wait()

    async def handle(self, stream: FrameStream) -> None:
        """One stream, from its first frame to its end.

        Raises ``PeerMisbehaved`` on a broken protocol and ``PeerGone`` when the stream breaks;
        the host resets the stream then, and that stream alone.
        """
        await welcome(stream, MAX_FRAME_BYTES, "training", self._serve)

    async def _serve(self, stream: FrameStream, first: Frame) -> None:
        if first.header.get("type") != "open":
            raise BadMessage("a stream starts with open")
        opened = OpenTraining.parse(first.header)
        try:
            self._check(opened, stream.peer_id)
        except Refusal as refusal:
            await stream.send(refusal_wire(refusal.code, str(refusal)))
            await stream.aclose()
            return
        session = TrainSession(
            opened,
            stream,
            self._engine,
            self._compute,
            max_tokens=self._max_tokens,
            tunings=self._tunings,
            kept=self._kept,
            room=self._room,
        )
        self._sessions.append(session)
        try:
            limits = {"max_tokens": self._max_tokens, "max_tuning": self._tunings.session_size}
            await stream.send({"type": "opened", **limits})
            await session.serve()
        finally:
            self._sessions.remove(session)
            ended, self._ended = self._ended, trio.Event()
            ended.set()

    def _check(self, opened: OpenTraining, peer_id: str) -> None:
        """Raise ``Refusal`` unless this node can serve the session."""
        span = self._engine.span
        if opened.fingerprint != self._fingerprint:
            raise Refusal("model", "this node serves another model")
        if opened.start < span.start or opened.end > span.end:
            raise Refusal("blocks", f"this node serves blocks {span.start}:{span.end}")
        if self._is_draining():
            raise Refusal("draining", "this node is about to leave")
        theirs = sum(session.client == peer_id for session in self._sessions)
        if len(self._sessions) >= MAX_SESSIONS or theirs >= MAX_SESSIONS_PER_PEER:
            raise Refusal("busy", f"{len(self._sessions)} training sessions are open here")
