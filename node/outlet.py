"""The sending end of one link of a chain: steps in order, each remembered before it goes out.

A client and a hop send alike, so both use this. One task sends; a link that is replaced brings the
new receiver up to date from the log, between two steps, and then goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import torch
import trio

from petalnode.errors import PeerError, PeerGone
from petalnode.p2p.frames import FrameStream
from petalnode.protocol import Replay, Step
from petalnode.replay import Kept, Source, replayed

OUTBOX_STEPS = 2
"""Steps that wait to be sent while the next is computed; more holds the giver back."""
SEND_DEADLINE_S = 60.0
"""For a receiver to take one step."""

Deliver = Callable[[Step, torch.Tensor], Awaitable[None]]
Lost = Callable[[PeerError], Awaitable[None]]


@dataclass(eq=False)
class _Attach:
    """Send to ``deliver`` from here on, after what the replay names."""

    deliver: Deliver
    replay: Replay
    done: trio.Event = field(default_factory=trio.Event)
    error: PeerError | None = None
    kept: Kept | None = None


class Outlet:
    """Sends steps to one receiver and remembers them in ``source``.

    ``lost`` is told when the receiver breaks; steps are still remembered then, until another
    receiver is attached. ``run`` is the one task that sends.
    """

    def __init__(self, source: Source, lost: Lost, deliver: Deliver | None = None) -> None:
        self.source = source
        self.replayed_tokens = 0
        self._lost = lost
        self._deliver = deliver
        self._floor: tuple[int, ...] = ()  # replays below it are no news to the receiver
        self._reach: list[int] = []  # of each row, how much the receiver has been sent
        self._stream: FrameStream | None = None
        self._outbox, self._to_send = trio.open_memory_channel[tuple[Step, torch.Tensor] | _Attach](
            OUTBOX_STEPS
        )

    async def put(self, step: Step, hidden: torch.Tensor) -> None:
        """Queue one step [T, H]; waits while others are before it."""
        await self._outbox.send((step, hidden))

    async def attach(self, deliver: Deliver, replay: Replay, stream: FrameStream | None) -> Kept:
        """Send to another receiver from now on. Returns when it was brought up to date, and with
        how much there was for that.

        ``stream``, if any, is reset when it is replaced. Raises what sending failed with.
        """
        if self._stream is not None and self._stream is not stream:
            self._stream.reset()  # a send that hangs there must not hold up the new one
        self._stream = stream
        item = _Attach(deliver, replay)
        await self._outbox.send(item)
        await item.done.wait()
        if item.error is not None:
            raise item.error
        assert item.kept is not None
        return item.kept

    def kept(self, rows: int) -> Kept:
        """How much of each row can be sent again now."""
        return Kept(tuple(map(self.source.length, range(rows))), self.source.complete)

    async def bring_up(self, deliver: Deliver, replay: Replay) -> Kept:
        """Replay to a receiver that stands by, in the caller's task; steps go on meanwhile.

        Returns how much there was for that.
        """
        kept = self.kept(len(replay.start))
        async with aclosing(replayed(self.source, replay)) as steps:
            async for step, hidden in steps:
                self.replayed_tokens += step.tokens
                await within_deadline(deliver, step, hidden)
        return kept

    async def _send(self, deliver: Deliver, step: Step, hidden: torch.Tensor) -> None:
        await within_deadline(deliver, step, hidden)
        if self._reach:
            for segment in step.segments:
                self._reach[segment.row] = segment.position + segment.n

    def detach(self) -> None:
        """Stop sending; steps are only remembered."""
        self._deliver = None
        if self._stream is not None:
            self._stream.reset()
            self._stream = None

    async def run(self) -> None:
        """Send for ever. Ends with the session's nursery."""
        async for item in self._to_send:
            if isinstance(item, _Attach):
                await self._attach(item)
                continue
            step, hidden = item
            ordered = self.source.ordered
            if step.order and step.seq > ordered and self._reach:
                self._reach = [self._reach[row] for row in step.order]
            self.source.record(step, hidden)
            if self.source.ordered != ordered:
                self._floor = (0,) * len(self._floor)  # a replay of other rows is news again
            if self._deliver is not None and self._is_next(step):
                try:
                    await self._send(self._deliver, step, hidden)
                except PeerError as error:
                    self._deliver = None
                    if self._stream is not None:
                        error.peer_id = error.peer_id or self._stream.peer_id
                    await self._lost(error)

    def _is_next(self, step: Step) -> bool:
        """Whether the receiver lacks the step, and lacks nothing before it.

        Behind a log that was too short, what comes next waits for the replay from further up,
        which brings it again.
        """
        if not self._reach:
            return True
        if step.seq == 0 and all(s.position + s.n <= self._floor[s.row] for s in step.segments):
            return False
        return all(s.position <= self._reach[s.row] for s in step.segments)

    async def _attach(self, item: _Attach) -> None:
        self._deliver, self._floor = item.deliver, item.replay.start
        item.kept = self.kept(len(item.replay.start))
        self._reach = [
            max(start, min(committed, self.source.length(row)))
            for row, (start, committed) in enumerate(
                zip(item.replay.start, item.replay.committed, strict=True)
            )
        ]
        try:
            async with aclosing(replayed(self.source, item.replay)) as steps:
                async for step, hidden in steps:
                    self.replayed_tokens += step.tokens
                    await self._send(item.deliver, step, hidden)
        except PeerError as error:
            item.error, self._deliver = error, None
        finally:
            item.done.set()


async def within_deadline(deliver: Deliver, step: Step, hidden: torch.Tensor) -> None:
    """Deliver, or raise ``PeerGone``."""
    with trio.move_on_after(SEND_DEADLINE_S) as scope:
        await deliver(step, hidden)
    if scope.cancelled_caught:
        raise PeerGone(f"A step was not taken within {SEND_DEADLINE_S:.0f} s.")
