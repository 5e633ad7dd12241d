"""Serves the hop protocol: accepts sessions, ties feeds to them, refuses what cannot be served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import trio

from petalnode.compute import Compute
from petalnode.errors import PeerError, PeerMisbehaved
from petalnode.models.tuning.tuning import Tuning
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import BadMessage, Open, max_payload_bytes, refusal_wire, session_id
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.hop_session import Connect, HopSession
from petalnode.serving.rows import Refusal
from petalnode.serving.session_tuning import SessionTuning, TuningBudget

MAX_SESSIONS = 256
MAX_SESSIONS_PER_PEER = 64
DEFAULT_LOG_TOKENS = 1 << 16
"""Hidden states that replay logs keep, for all sessions together, when nothing else was said."""
TELL_DEADLINE_S = 2.0
HELLO_DEADLINE_S = 10.0
"""For the first frame on a new stream."""


class HopServer:
    """The sessions of one node. ``handle`` is the stream handler of ``HOP_PROTOCOL``.

    ``adapters`` are offered to sessions by name, the part of each for this span; what sessions
    bring themselves is charged to ``tunings``.
    """

    def __init__(
        self,
        engine: SpanEngine,
        budget: KvBudget,
        *,
        compute: Compute,
        fingerprint: str,
        connect: Connect,
        log_budget: KvBudget | None = None,
        tunings: TuningBudget | None = None,
    ) -> None:
        self._engine = engine
        self._budget = budget
        self._log_budget = log_budget or KvBudget(DEFAULT_LOG_TOKENS, 1)
        self.adapters: Mapping[str, Tuning] = {}
        self.tunings = tunings or TuningBudget()
        self._compute = compute
        self._fingerprint = fingerprint
        self._connect = connect
        self._sessions: dict[bytes, HopSession] = {}
        self.draining = False
        self._ended = trio.Event()

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def log_tokens(self) -> int:
        """Hidden states that the replay logs of all sessions hold now."""
        return self._log_budget.used

    async def drain(self) -> None:
        """Take no new sessions, and tell the clients of those here to move."""
        self.draining = True
        for session in list(self._sessions.values()):
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
        most = max_payload_bytes(self._engine.span.config.hidden_size)
        await welcome(stream, most, "hop", self._dispatch)

    async def _dispatch(self, stream: FrameStream, first: Frame) -> None:
        try:
            if first.header.get("type") == "open":
                session = self._open(Open.parse(first.header), stream)
            elif first.header.get("type") == "feed":
                return await self._feed(session_id(first.header), stream)
            else:
                raise BadMessage("a stream starts with open or feed")
        except Refusal as refusal:
            await stream.send(refusal_wire(refusal.code, str(refusal)))
            await stream.aclose()
            return
        try:
            await session.serve()
        finally:
            del self._sessions[session.opened.session]
            self._ended.set()
            self._ended = trio.Event()

    def _open(self, opened: Open, stream: FrameStream) -> HopSession:
        self._check(opened, stream.peer_id)
        client, span, served = stream.peer_id, self._engine.span, self.adapters.get(opened.adapter)
        session = HopSession(
            opened,
            stream,
            self._engine,
            self._budget,
            self._log_budget,
            self._connect,
            SessionTuning(opened, client, span, self._compute, self.tunings, served),
        )
        self._sessions[opened.session] = session
        return session

    def _check(self, opened: Open, peer_id: str) -> None:
        """Raise ``Refusal`` unless this node can serve the session."""
        span = self._engine.span
        if opened.fingerprint != self._fingerprint:
            raise Refusal("model", "this node serves another model")
        if opened.start < span.start or opened.end > span.end:
            raise Refusal("blocks", f"this node serves blocks {span.start}:{span.end}")
        if opened.adapter and opened.adapter not in self.adapters:
            raise Refusal("adapter", "this node does not offer that adapter")
        if self.draining:
            raise Refusal("draining", "this node is about to leave")
        if opened.session in self._sessions:
            raise Refusal("session", "that session is already open here")
        theirs = sum(session.client == peer_id for session in self._sessions.values())
        if len(self._sessions) >= MAX_SESSIONS or theirs >= MAX_SESSIONS_PER_PEER:
            raise Refusal("busy", f"{len(self._sessions)} sessions are open here")
        if self._budget.tokens_free == 0:
            raise Refusal("busy", "the attention cache is full")

    async def _feed(self, session: bytes, stream: FrameStream) -> None:
        found = self._sessions.get(session)
        if found is None or stream.peer_id not in found.senders:
            raise Refusal("session", "no session here awaits a feed from you under that name")
        try:
            await found.serve_feed(stream)
        except PeerError:
            return  # the sender's end is its client's business: it watches that hop itself


async def welcome(
    stream: FrameStream,
    max_payload: int,
    protocol: str,
    serve: Callable[[FrameStream, Frame], Awaitable[None]],
) -> None:
    """Await a stream's first frame, then serve it with payloads of up to ``max_payload`` bytes.

    Raises ``PeerMisbehaved`` that names the protocol where ``serve`` says that it was broken.
    """
    stream.max_payload = 0  # a stranger's first words reserve no memory here
    with trio.fail_after(HELLO_DEADLINE_S):
        first = await stream.receive()
    if first is None:
        return
    stream.max_payload = max_payload
    try:
        await serve(stream, first)
    except BadMessage as bad:
        raise PeerMisbehaved(
            f"Peer {stream.peer_id} broke the {protocol} protocol: {bad}.", peer_id=stream.peer_id
        ) from None
