"""One session as a hop sees it: rows of cache over a sub-span, and where its outputs go.

Task tree: the control stream's handler task owns the session. Inside its nursery run the control
reader (which is the session's owner), one sending task, and one task for each link being made. Feed
streams have handler tasks of their own, which only read. Everything is dropped when the control
stream ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import torch
import trio

from petalnode.errors import LocalProtocolError, PeerError, PeerGone
from petalnode.nurseries import plain_errors
from petalnode.outlet import Outlet
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import (
    HOP_PROTOCOL,
    MAX_POSITION,
    MAX_ROWS,
    BadMessage,
    Link,
    Open,
    Step,
    error_wire,
    feed_wire,
    text,
    wholes,
)
from petalnode.replay import Kept, ReplayLog
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.rows import Refusal, SessionRows
from petalnode.serving.session_tuning import SessionTuning

LINK_DEADLINE_S = 4.0
"""For dialling the next hop and having it accept the feed."""
MAX_LINKS_AT_ONCE = 4
MAX_SPARES = 4
"""Feeds to peers that stand by; the newest are kept."""
MAX_REACHES_AT_ONCE = 4
MAX_FEEDS = 4
"""Open at once: of the sender, of the one to come, and those they replace."""

Connect = Callable[[str, tuple[str, ...], str], Awaitable[FrameStream]]
"""Opens a stream: peer id, its addresses, protocol."""


class HopSession:
    """Blocks ``[start, end)`` for one client's session. Made by ``HopServer``."""

    def __init__(
        self,
        opened: Open,
        control: FrameStream,
        engine: SpanEngine,
        budget: KvBudget,
        log_budget: KvBudget,
        connect: Connect,
        tuning: SessionTuning,
    ) -> None:
        self.opened = opened
        self.client = control.peer_id
        self.senders: tuple[str, ...] = (opened.sender or control.peer_id,)
        self._control = control
        self._engine = engine
        self._rows = SessionRows(opened, engine.span, budget)
        self._rows.tuning = tuning.added
        self._tuning = tuning
        self._log = ReplayLog(opened.rows, log_budget)
        self._outlet = Outlet(self._log, self._lost_next, self._return)
        self._connect = connect
        self._one_step = trio.Lock()  # an old feed's last step ends before a new feed's first
        self._feeds: dict[FrameStream, trio.CancelScope] = {}
        self._spares: dict[bytes, FrameStream] = {}
        self._next = b""
        self._linking = self._reaching = 0
        self._seen = 0
        self._in_gap = False

    async def serve(self) -> None:
        """Accept the session, read the control stream to its end, then drop everything held."""
        try:
            await self._control.send({"type": "opened"})
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._outlet.run)
                    nursery.start_soon(self._watch_client, nursery.cancel_scope)
                    await self._read_control(nursery)
                    nursery.cancel_scope.cancel()
        finally:
            self._drop()

    async def serve_feed(self, feed: FrameStream) -> None:
        """Take steps from the sender until its stream ends."""
        if len(self._feeds) >= MAX_FEEDS:
            self._end_feed(next(iter(self._feeds)))  # the oldest makes room
        self._in_gap = False  # it may have what was lacking
        with trio.CancelScope() as scope:  # it ends with the session, whatever it waits for
            self._feeds[feed] = scope
            try:
                await feed.send({"type": "fed"})
                while (frame := await feed.receive()) is not None:
                    await self._take(frame)
            finally:
                self._feeds.pop(feed, None)

    def _end_feed(self, feed: FrameStream) -> None:
        self._feeds.pop(feed).cancel()
        feed.reset()

    async def say_draining(self) -> None:
        """Tell the client that this node is about to leave."""
        await self._control.send({"type": "draining"})

    async def _watch_client(self, scope: trio.CancelScope) -> None:
        """A client that left ends everything at once, whatever waits unread."""
        await self._control.wait_broken()
        scope.cancel()

    async def _read_control(self, nursery: trio.Nursery) -> None:
        while (frame := await self._control.receive()) is not None:
            kind = frame.header.get("type")
            if kind == "link":
                link = Link.parse(frame.header, self.opened.rows)
                if self._linking >= MAX_LINKS_AT_ONCE:
                    raise BadMessage("too many links at once")
                self._linking += 1  # here: more may be read before the task first runs
                nursery.start_soon(self._link, link)
            elif kind == "tuning":
                await self._tune(frame)
            elif kind == "expect":
                await self._expect(text(frame.header.get("peer")), frame.header.get("also") is True)
            elif kind == "where":
                at = {"seen": self._seen, "sent": self._log.last_seq, "done": self._engine.tokens}
                await self._control.send({"type": "at", **at})
            elif kind == "reach":
                lengths = wholes(frame.header.get("lengths"), MAX_ROWS, MAX_POSITION)
                if self._reaching >= MAX_REACHES_AT_ONCE:
                    raise BadMessage("too many questions at once")
                self._reaching += 1
                nursery.start_soon(self._reach, lengths)
            else:
                raise BadMessage("a message of unknown type")

    async def _tune(self, frame: Frame) -> None:
        """Take a part of what the client adds to the blocks."""
        try:
            last = await self._tuning.take(frame)
        except Refusal as refusal:
            await self._control.send(error_wire(refusal.code, str(refusal)))
            return
        if self._rows.in_use:
            raise BadMessage("an adapter after the first step")
        if last:
            self._rows.tuning = self._tuning.added
            await self._control.send({"type": "tuned"})

    async def _expect(self, peer: str, also: bool) -> None:
        """From now on that peer is the sender, and what the old one still says is void; or it may
        ``also`` feed, because it is about to take over."""
        if also:
            self.senders = (self.senders[0], peer)
        else:
            self.senders = (peer,)
            for feed in [feed for feed in self._feeds if feed.peer_id != peer]:
                self._end_feed(feed)
        await self._control.send({"type": "expecting"})

    async def _reach(self, lengths: tuple[int, ...]) -> None:
        await self._rows.wait_lengths(lengths)
        await self._control.send({"type": "reached"})
        self._reaching -= 1

    async def _take(self, frame: Frame) -> None:
        """Compute one step and queue its output. What cannot be taken is told to the client."""
        step = Step.parse(frame.header, self.opened.rows)
        started = trio.current_time()
        async with self._one_step:
            await trio.lowlevel.checkpoint_if_cancelled()  # a lock is had also where all is over
            try:
                hidden = self._check_hidden(step, frame)
                rows = self._rows.prepare(step)
                self._seen, self._in_gap = max(self._seen, step.seq), False
                output = await self._engine.run(self.opened.start, self.opened.end, rows, hidden)
            except (Refusal, LocalProtocolError) as problem:
                await self._refuse(problem)
                return
            self._rows.done()
            took = round((trio.current_time() - started) * 1e6)
            await self._outlet.put(step.passed(took), output)

    async def _refuse(self, problem: Refusal | LocalProtocolError) -> None:
        """Tell the client. What comes behind a gap is in the same gap, until something fits."""
        code = problem.code if isinstance(problem, Refusal) else "internal"
        if code == "gap" and self._in_gap:
            return
        self._in_gap = code == "gap"
        await self._control.send(error_wire(code, str(problem)))

    def _check_hidden(self, step: Step, frame: Frame) -> torch.Tensor:
        shape = (step.tokens, self._engine.span.config.hidden_size)
        if len(frame.tensors) != 1 or tuple(frame.tensors[0].shape) != shape:
            raise BadMessage(f"the hidden states are not of shape {shape}")
        if not frame.tensors[0].is_floating_point():
            raise BadMessage("the hidden states are not floating point")
        return frame.tensors[0]

    async def _link(self, link: Link) -> None:
        """Push outputs to ``link.peer`` from now on, or bring it up to date as a spare."""
        try:
            await self._control.send(await self._linked(link))
        finally:
            self._linking -= 1  # only now: a client that reads no answers gets no more tasks

    async def _linked(self, link: Link) -> dict[str, Any]:
        """Make the link; what to answer."""
        try:
            if link.peer is None:
                kept = await self._outlet.attach(self._pass_through, link.replay, None)
            else:
                kept = await self._link_peer(link, link.peer)
        except (PeerError, trio.TooSlowError) as error:
            why = str(error) or f"no answer within {LINK_DEADLINE_S:.0f} s"
            return error_wire("link", why, link.session)
        logged = {"logged": list(kept.lengths), "complete": kept.complete}
        return {"type": "linked", "session": link.session, **logged}

    async def _link_peer(self, link: Link, peer: str) -> Kept:
        stream = self._spares.pop(link.session, None)
        if stream is None:
            with trio.fail_after(LINK_DEADLINE_S):
                stream = await open_feed(self._connect, peer, link.addrs, link.session)
        deliver = partial(send_step, stream)
        if link.spare:
            self._keep_spare(link.session, stream)
            return await self._outlet.bring_up(deliver, link.replay)
        self._next = link.session
        return await self._outlet.attach(deliver, link.replay, stream)

    def _keep_spare(self, session: bytes, stream: FrameStream) -> None:
        replaced = self._spares.pop(session, None)  # two links at once opened a stream each
        if len(self._spares) >= MAX_SPARES:
            replaced = self._spares.pop(next(iter(self._spares)))
        if replaced is not None:
            replaced.reset()
        self._spares[session] = stream

    async def _lost_next(self, error: PeerError) -> None:
        await self._control.send(error_wire("next", str(error), self._next))

    async def _return(self, step: Step, hidden: torch.Tensor) -> None:
        """The last hop's way: to the client, what it wants. Nobody awaits a replay."""
        if step.seq:
            await self._control.send(*returned(step, hidden))

    async def _pass_through(self, step: Step, hidden: torch.Tensor) -> None:
        await self._control.send({**step.to_wire(), "type": "through"}, [hidden])

    def _drop(self) -> None:
        for stream in (self._control, *self._spares.values()):
            stream.reset()
        self._outlet.detach()
        for feed in list(self._feeds):
            self._end_feed(feed)
        self._rows.drop()
        self._tuning.drop()
        self._log.drop()


async def open_feed(
    connect: Connect, peer: str, addrs: tuple[str, ...], session: bytes
) -> FrameStream:
    """A stream on which ``peer`` takes steps of the session. Raises ``PeerError``."""
    stream = await connect(peer, addrs, HOP_PROTOCOL)
    most, stream.max_payload = stream.max_payload, 0  # the answer reserves no memory here
    try:
        await stream.send(feed_wire(session))
        answer = await stream.receive()
    except BaseException:
        stream.reset()
        raise
    if answer is None or answer.header.get("type") != "fed":
        stream.reset()
        raise PeerGone(f"Peer {peer} does not take the feed.", peer_id=peer)
    stream.max_payload = most
    return stream


async def send_step(stream: FrameStream, step: Step, hidden: torch.Tensor) -> None:
    """Deliver a step on a feed. Raises ``PeerGone`` that names the receiver."""
    try:
        await stream.send(step.to_wire(), [hidden])
    except PeerError as error:
        raise PeerGone(str(error), peer_id=stream.peer_id) from error


def returned(step: Step, hidden: torch.Tensor) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The ``out`` frame: of each segment only the last ``want`` outputs."""
    parts = []
    offset = 0
    for segment in step.segments:
        offset += segment.n
        parts.append(hidden[offset - segment.want : offset])
    wanted = torch.cat(parts) if len(parts) > 1 else parts[0]
    return {**step.to_wire(), "type": "out"}, [wanted]
