"""The links of a chain: who feeds whom, and what a receiver is sent again when its sender changes.

A link brings its receiver up to date from the sender's log. Where that log is too short, the sender
is fed anew itself, so that what is lacking comes through it; and so on up the chain, in the last
resort from the client's token ids. Two hops that cannot reach each other are relayed by the client
(the paper's Algorithm 1).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from petalnode.errors import PeerGone, UsageError
from petalnode.outlet import Outlet
from petalnode.p2p.frames import FrameStream
from petalnode.protocol import Link, Replay, Step
from petalnode.replay import Kept
from petalnode.serving.hop_session import open_feed, send_step
from petalnode.session.line import Line, LinkFailed

if TYPE_CHECKING:
    from petalnode.session.chain import Chain


class Links:
    """The links of one chain."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def feeder(self, index: int) -> object:
        """Who is to push to hop ``index``."""
        return self._chain.lines[index - 1] if index else self._chain

    async def connect(self, index: int) -> None:
        """Have hop ``index`` fed by the one before it, and bring it up to date.

        If that one's log is too short, it is to be connected next: its ``feeder`` is None then.
        """
        chain, line = self._chain, self._chain.lines[index]
        replay = chain.replay(line.held)
        outlet = chain.head if index == 0 else chain.lines[index - 1].through
        if outlet is not None:
            kept = await self._feed(line, outlet, replay)
        else:
            kept = await self._link(index, replay)
        line.feeder, line.fed_since = self.feeder(index), chain.last_seq
        self._make_up(index, replay, kept)

    def to(self, line: Line, replay: Replay, *, spare: bool = False) -> Link:
        """The link that has a hop push to ``line``."""
        return Link(line.peer_id, line.session, self._addrs(line.peer_id), replay, spare)

    async def open_feed(self, line: Line) -> FrameStream:
        """A stream on which the client feeds a hop."""
        if line.expects != self._chain.setup.client:
            await line.expect(self._chain.setup.client)
        return await open_feed(self._dial, line.peer_id, (), line.session)

    async def deliver(self, stream: FrameStream, step: Step, hidden: torch.Tensor) -> None:
        """Send what was not given up."""
        if step.seq == 0 or self._chain.is_wanted(step.seq):
            await send_step(stream, step, hidden)

    async def _feed(self, line: Line, outlet: Outlet, replay: Replay) -> Kept:
        """Feed a hop ourselves."""
        stream = await self.open_feed(line)
        line.outlet = outlet
        return await outlet.attach(partial(self.deliver, stream), replay, stream)

    async def _link(self, index: int, replay: Replay) -> Kept:
        """Have the hop before feed hop ``index``; relay between the two if they do not meet."""
        chain = self._chain
        sender, line = chain.lines[index - 1], chain.lines[index]
        if line.expects != sender.peer_id:
            await line.expect(sender.peer_id)
        try:
            kept = await sender.link(self.to(line, replay))
        except LinkFailed as failed:
            if chain.setup.replacements is None:
                raise PeerGone(
                    f"Peer {sender.peer_id} lost its next hop {line.peer_id}: {failed}",
                    peer_id=line.peer_id,
                ) from None
            return await self._relay(sender, line, replay)
        if line.outlet is not None:  # it was relayed before
            line.outlet.detach()
            line.outlet = None
        return kept

    async def _relay(self, sender: Line, line: Line, replay: Replay) -> Kept:
        """Pass on what ``sender`` gives back; the log of that is ours then.

        It begins empty, so the sender gives back everything that it still has, once; it goes on to
        the hop only where that lacks it.
        """
        chain = self._chain
        outlet = chain.new_outlet()
        await self._feed(line, outlet, Replay(replay.start, replay.start))
        sender.through = outlet
        everything = chain.replay([0] * chain.rows)
        kept = await sender.link(Link(None, line.session, (), everything))
        if not kept.complete:  # then what the hop itself lacks
            kept = await sender.link(Link(None, line.session, (), replay))
        return kept

    def _make_up(self, index: int, replay: Replay, kept: Kept) -> None:
        """Where a log was too short for hop ``index``, have its owner fed with that anew."""
        chain = self._chain
        lacking = [
            max(start, have) if have < committed and start < committed else committed
            for start, have, committed in zip(
                replay.start, kept.lengths, replay.committed, strict=True
            )
        ]
        is_short = lacking != list(replay.committed)
        if kept.complete or not (is_short or chain.pending()):
            return  # a log that is too short has not kept what is under way either
        if index == 0:
            raise UsageError(
                "A hop was lost, and the session's inputs are too long to be remembered for it.",
                "Feed fewer positions in one session.",
            )
        sender = chain.lines[index - 1]
        if is_short:
            if chain.rows > 1:  # all rows, so that no hop mixes two arrangements of them
                lacking = [0] * chain.rows
            sender.held = [*map(min, sender.held or lacking, lacking)]
        sender.feeder = None

    async def _dial(self, peer: str, addrs: tuple[str, ...], protocol: str) -> FrameStream:
        return await self._chain.setup.opener.open_stream(peer, protocol)

    def _addrs(self, peer_id: str) -> tuple[str, ...]:
        setup = self._chain.setup
        if setup.replacements is not None:
            return setup.replacements.addrs(peer_id)
        return (setup.addrs or {}).get(peer_id, ())
