"""One session as a hop sees it: rows of cache over a sub-span, and where its outputs go.

Task tree: the control stream's handler task owns the session. Inside its nursery run the control
reader (which is the session's owner) and one sender task. Feed streams have handler tasks of their
own, which only read. Everything is dropped when the control stream ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch
import trio

from petalnode.errors import LocalProtocolError, PeerError
from petalnode.models.kv_cache import RowCache
from petalnode.nurseries import plain_errors
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import (
    HOP_PROTOCOL,
    BadMessage,
    Link,
    Open,
    Segment,
    Step,
    error_wire,
    feed_wire,
)
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import RowWork, SpanEngine

OUTBOX_FRAMES = 2
"""Outputs that wait to be sent while the next chunk is computed; more holds the reader back."""
SEND_DEADLINE_S = 60.0
"""For the client or the next hop to take one output; after that the session is dropped."""
LINK_DEADLINE_S = 10.0
"""For dialling the next hop and having it accept the feed."""

Connect = Callable[[str, tuple[str, ...], str], Awaitable[FrameStream]]
"""Opens a stream: peer id, its addresses, protocol."""


class Refusal(Exception):
    """The step cannot be taken; the client is told ``code`` and why, and the session goes on."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True)
class Outgoing:
    """One output on its way."""

    step: Step
    hidden: torch.Tensor


class HopSession:
    """Blocks ``[start, end)`` for one client's session. Made by ``HopServer``."""

    def __init__(
        self,
        opened: Open,
        control: FrameStream,
        engine: SpanEngine,
        budget: KvBudget,
        connect: Connect,
    ) -> None:
        self.opened = opened
        self.client = control.peer_id
        self._control = control
        self._engine = engine
        self._budget = budget
        self._connect = connect
        self._rows: dict[int, RowCache] = {}
        self._held = 0
        self._one_step = trio.Lock()  # an old feed's last step ends before a new feed's first
        self._feed: FrameStream | None = None
        self._next: FrameStream | None = None
        self._feed_scopes: set[trio.CancelScope] = set()
        self._outbox, self._to_send = trio.open_memory_channel[Outgoing](OUTBOX_FRAMES)

    async def serve(self) -> None:
        """Read the control stream to its end, then drop everything this session holds."""
        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_outputs)
                    nursery.start_soon(self._watch_client, nursery.cancel_scope)
                    await self._read_control()
                    nursery.cancel_scope.cancel()
        finally:
            self._drop()

    async def serve_feed(self, feed: FrameStream) -> None:
        """Take steps from the previous hop until its stream ends; a new feed replaces the old."""
        if self._feed is not None:
            self._feed.reset()
        self._feed = feed
        await feed.send({"type": "fed"})
        with trio.CancelScope() as scope:  # it ends with the session, whatever it waits for
            self._feed_scopes.add(scope)
            try:
                while (frame := await feed.receive()) is not None:
                    await self._take(frame)
            finally:
                self._feed_scopes.discard(scope)

    async def _watch_client(self, scope: trio.CancelScope) -> None:
        """The reader may be busy with a step for long; a client that left ends it at once."""
        await self._control.wait_broken()
        scope.cancel()

    async def _read_control(self) -> None:
        while (frame := await self._control.receive()) is not None:
            if frame.header.get("type") == "link":
                await self._link(Link.parse(frame.header))
            elif self.opened.sender is None:
                await self._take(frame)
            else:
                raise BadMessage("steps of this session come from another peer")

    async def _take(self, frame: Frame) -> None:
        """Compute one step and queue its output. What cannot be taken is told to the client."""
        async with self._one_step:
            await self._compute(frame)

    async def _compute(self, frame: Frame) -> None:
        step = Step.parse(frame.header, self.opened.rows)
        try:
            hidden = self._check_hidden(step, frame)
            rows = [self._row_work(segment) for segment in step.segments]
            self._reserve(step)
            output = await self._engine.run(self.opened.start, self.opened.end, rows, hidden)
        except (Refusal, LocalProtocolError) as problem:
            code = problem.code if isinstance(problem, Refusal) else "internal"
            await self._control.send(error_wire(code, str(problem)))
            return
        await self._outbox.send(Outgoing(step, output))

    def _check_hidden(self, step: Step, frame: Frame) -> torch.Tensor:
        shape = (step.tokens, self._engine.span.config.hidden_size)
        if len(frame.tensors) != 1 or tuple(frame.tensors[0].shape) != shape:
            raise BadMessage(f"the hidden states are not of shape {shape}")
        if not frame.tensors[0].is_floating_point():
            raise BadMessage("the hidden states are not floating point")
        return frame.tensors[0]

    def _row_work(self, segment: Segment) -> RowWork:
        cache = self._rows.get(segment.row)
        if cache is None:
            cache = self._engine.span.new_row(self.opened.start, self.opened.end)
            self._rows[segment.row] = cache
        if segment.position > cache.length:
            raise Refusal(
                "gap", f"row {segment.row} has {cache.length} positions, not {segment.position}"
            )
        limit = self._engine.span.config.max_positions
        if segment.position + segment.n > limit:
            raise Refusal("context", f"the model's context is {limit} tokens")
        return RowWork(cache, segment.position, segment.n)

    def _reserve(self, step: Step) -> None:
        after = {row: cache.length for row, cache in self._rows.items()}
        after.update({s.row: s.position + s.n for s in step.segments})
        # What the memory takes: rolling back keeps it, and it grows in strides.
        held = (self._rows[row].capacity_after(length) for row, length in after.items())
        wanted = sum(held) * (self.opened.end - self.opened.start)
        if not self._budget.resize(self._held, wanted):
            raise Refusal("busy", f"room for {self._budget.tokens_free} more cached tokens only")
        self._held = wanted

    async def _link(self, link: Link) -> None:
        """Push outputs to ``link.peer`` from now on."""
        if self._next is not None:
            self._next.reset()
            self._next = None
        try:
            with trio.fail_after(LINK_DEADLINE_S):
                self._next = await self._open_feed(link)
        except (PeerError, trio.TooSlowError) as error:
            why = str(error) or f"no answer within {LINK_DEADLINE_S:.0f} s"
            await self._control.send(error_wire("link", why, link.peer))
            return
        await self._control.send({"type": "linked", "peer": link.peer})

    async def _open_feed(self, link: Link) -> FrameStream:
        stream = await self._connect(link.peer, link.addrs, HOP_PROTOCOL)
        await stream.send(feed_wire(self.opened.session))
        answer = await stream.receive()
        if answer is None or answer.header.get("type") != "fed":
            stream.reset()
            raise PeerError(f"Peer {link.peer} does not take the feed.", peer_id=link.peer)
        return stream

    async def _send_outputs(self) -> None:
        async for outgoing in self._to_send:
            with trio.fail_after(SEND_DEADLINE_S):
                await self._send(outgoing)

    async def _send(self, outgoing: Outgoing) -> None:
        stream = self._next
        if stream is None:
            await self._control.send(*returned(outgoing))
            return
        try:
            await stream.send(outgoing.step.to_wire(), [outgoing.hidden])
        except PeerError as error:
            if self._next is stream:
                self._next = None
            await self._control.send(error_wire("next", str(error), stream.peer_id))

    def _drop(self) -> None:
        for stream in (self._control, self._feed, self._next):
            if stream is not None:
                stream.reset()
        for scope in list(self._feed_scopes):
            scope.cancel()
        self._rows.clear()
        self._budget.resize(self._held, 0)


def returned(outgoing: Outgoing) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The ``out`` frame: of each segment only the last ``want`` outputs."""
    parts = []
    offset = 0
    for segment in outgoing.step.segments:
        offset += segment.n
        parts.append(outgoing.hidden[offset - segment.want : offset])
    wanted = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Step(outgoing.step.seq, outgoing.step.segments, "out").to_wire(), [wanted]
