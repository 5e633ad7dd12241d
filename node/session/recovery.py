"""Mending a chain: lost hops are replaced, links made anew, and only what is lacking is sent again.

Everything runs in the task that awaits an output, so there is one view of the chain and no race
with the steps. The sender of a lost hop replays its log to the replacement; where that log is
short, whoever is one hop further up replays the rest through it, in the last resort the client. A
hop that cannot reach the next is relayed by the client (design.md section 5; the paper's
Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
import trio

from petalnode.errors import PeerError, PeerGone
from petalnode.events import Recovered
from petalnode.nurseries import plain_errors
from petalnode.outlet import Outlet
from petalnode.p2p.frames import FrameStream
from petalnode.protocol import Link, Replay, Step
from petalnode.routing.chain import Gap, Hop
from petalnode.serving.hop_session import open_feed, send_step
from petalnode.session.line import Line, LinkFailed, open_line
from petalnode.session.moves import Moves
from petalnode.session.stuck import StuckSteps

if TYPE_CHECKING:
    from petalnode.session.chain import Chain

MEND_DEADLINE_S = 120.0
"""For a chain to be whole again; waiting for a node that holds the blocks counts."""
MAX_ATTEMPTS = 64
LOOK_S = 2.0
"""How often a chain looks for a slow hop."""
LOOK_TOKENS = 8
"""Tokens that a hop must have been measured on."""
AVOID_S = 15.0
"""A peer that a session lost, or that refused it, is not asked again for so long."""
OPEN_DEADLINE_S = 15.0
"""For every hop of a new chain to accept the session and reach the next."""


class Replacements(Protocol):
    """Who finds other hops for a chain, and keeps account of peers."""

    async def find(self, gap: Gap, avoid: Mapping[str, PeerError]) -> Sequence[Hop]:
        """Hops that cover the blocks of ``gap``, none of them in ``avoid``.

        Waits, and says for what, while there are none. Raises ``NoRoute`` past a deadline.
        """

    def is_slow(self, hop: Hop, took_s: float) -> bool:
        """Whether another would clearly need less than ``took_s`` seconds a token for the hop."""

    def observe(self, hop: Hop, took_s: float) -> None:
        """A hop needs ``took_s`` seconds a token."""

    def addrs(self, peer_id: str) -> tuple[str, ...]:
        """Where a peer listens, for others to dial it."""

    def blame(self, error: PeerError) -> None:
        """A peer failed, or refused, as the error says."""

    def report(self, event: Recovered | None, hops: Sequence[Hop]) -> None:
        """The chain is whole again, over these hops; None where nothing was lost: it moved."""


class Mender:
    """Keeps one chain whole."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._avoid: dict[str, tuple[float, PeerError]] = {}
        self.stuck = StuckSteps(chain)
        self._look_at = 0.0
        self._moves = Moves(chain, self)

    async def open(self, hops: Sequence[Hop]) -> None:
        """Open all hops at once, then link them. Raises what the first failing hop failed with."""
        chain = self._chain
        with trio.move_on_after(OPEN_DEADLINE_S) as deadline:
            chain.lines[:] = await self.open_lines(hops, chain.setup.client)
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    for index in range(len(chain.lines)):
                        nursery.start_soon(self._connect, index)
        if deadline.cancelled_caught:
            raise PeerGone(f"The chain did not open in {OPEN_DEADLINE_S:.0f} s.")
        self._raise_lost()

    async def mend(self, *, moved: bool = False) -> None:
        """Make the chain whole if it is not, or is not yet after a move. Raises why it cannot."""
        if self._is_whole():
            return
        if self._chain.setup.replacements is None:
            self._raise_lost()
        started, replayed = trio.current_time(), self._replayed_tokens()
        lost = {line.peer_id: line.lost for line in self._chain.lines if line.lost is not None}
        for error in lost.values():
            self._give_up(error)
        await self._mend_in_time(lost)
        self.stuck.forget()
        if moved and not lost:
            self._report_hops(None)
        else:
            self._report(lost, started, self._replayed_tokens() - replayed)

    async def _mend_in_time(self, lost: dict[str, PeerError]) -> None:
        with trio.move_on_after(MEND_DEADLINE_S):
            for _ in range(MAX_ATTEMPTS):
                try:
                    await self._mend_once(lost)
                except PeerError as error:
                    self._give_up(error)
                    lost.setdefault(error.peer_id, error)
                    continue
                if self._is_whole():
                    return
        raise next(iter(lost.values()), None) or PeerGone(
            f"The chain could not be mended in {MEND_DEADLINE_S:.0f} s."
        )

    async def _mend_once(self, lost: dict[str, PeerError]) -> None:
        for line in self._chain.lines:
            if line.lost is not None and line.peer_id not in lost:
                lost[line.peer_id] = line.lost
                self._give_up(line.lost)
        await self._replace_lost()
        for index in reversed(range(len(self._chain.lines))):
            line = self._chain.lines[index]
            if line.lost is not None:
                raise line.lost
            if line.feeder is not self._feeder(index):
                await self._connect(index)

    async def _replace_lost(self) -> None:
        """Open hops in the place of each run of lost ones."""
        replacements = self._chain.setup.replacements
        assert replacements is not None
        lines: list[Line] = []
        runs = groupby(self._chain.lines, key=lambda line: line.lost is not None)
        for is_lost, group in [(is_lost, list(run)) for is_lost, run in runs]:
            if not is_lost:
                lines += group
                continue
            hops = await replacements.find(self.gap(group), self.avoided())
            sender = lines[-1].peer_id if lines else self._chain.setup.client
            lines += await self.open_lines(hops, sender)
        self._chain.lines[:] = lines

    def gap(self, group: Sequence[Line]) -> Gap:
        """The blocks of some hops, and between whom they lie."""
        lines = self._chain.lines
        before, after = lines.index(group[0]) - 1, lines.index(group[-1]) + 1
        return Gap(
            group[0].hop.start,
            group[-1].hop.end,
            lines[before].peer_id if before >= 0 else None,
            lines[after].peer_id if after < len(lines) else None,
        )

    async def open_lines(self, hops: Sequence[Hop], first_sender: str) -> list[Line]:
        setup = self._chain.setup
        senders = [first_sender, *(hop.peer_id for hop in hops[:-1])]
        opened: list[Line | None] = [None] * len(hops)

        async def one(index: int) -> None:
            opened[index] = await open_line(
                setup.opener,
                hops[index],
                setup.fingerprint,
                setup.rows,
                senders[index],
                setup.client,
                setup.rng,
            )

        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    for index in range(len(hops)):
                        nursery.start_soon(one, index)
        except BaseException:
            for line in opened:
                if line is not None:
                    line.control.reset()
            raise
        lines = [line for line in opened if line is not None]
        for line in lines:
            self._chain.start_line(line)
        return lines

    async def _connect(self, index: int) -> None:
        """Have hop ``index`` fed by the one before it, and bring it up to date."""
        chain, line = self._chain, self._chain.lines[index]
        if index == 0:
            await self._feed(line, chain.head)
        elif (through := chain.lines[index - 1].through) is not None:
            await self._feed(line, through)
        else:
            await self._link(index)
        line.feeder = self._feeder(index)
        if index == 0 or chain.lines[index - 1].held is None:
            for one in chain.lines[index:]:  # what is complete completes what it feeds
                if one.feeder is not self._feeder(chain.lines.index(one)):
                    break
                one.held = None

    async def _feed(self, line: Line, outlet: Outlet) -> None:
        """Feed a hop ourselves."""
        chain = self._chain
        if line.expects != chain.setup.client:
            await line.expect(chain.setup.client)
        stream = await open_feed(self.dial, line.peer_id, (), line.session)
        line.outlet = outlet
        await outlet.attach(partial(self.deliver, stream), chain.replay(line.held), stream)

    async def _link(self, index: int) -> None:
        """Have the hop before feed hop ``index``; relay between the two if they do not meet."""
        chain = self._chain
        sender, line = chain.lines[index - 1], chain.lines[index]
        if line.expects != sender.peer_id:
            await line.expect(sender.peer_id)
        replay = chain.replay(line.held)
        try:
            logged = await sender.link(self.to(line, replay))
        except LinkFailed as failed:
            if chain.setup.replacements is None:
                raise PeerGone(
                    f"Peer {sender.peer_id} lost its next hop {line.peer_id}: {failed}",
                    peer_id=line.peer_id,
                ) from None
            logged = await self._relay(sender, line)
        else:
            if line.outlet is not None:  # it was relayed before
                line.outlet.detach()
                line.outlet = None
        if sender.held is None:  # else what it lacks now goes through it when it comes
            await self._extend(index - 1, replay, logged)

    async def _relay(self, sender: Line, line: Line) -> tuple[int, ...]:
        """Pass on what ``sender`` gives back; the log of that is ours then."""
        outlet = self._chain.new_outlet()
        # Our log of this link begins empty, so the sender gives everything back once; it is passed
        # on only where the hop lacks it.
        known = self._chain.replay(line.held).start
        if line.expects != self._chain.setup.client:
            await line.expect(self._chain.setup.client)
        stream = await open_feed(self.dial, line.peer_id, (), line.session)
        line.outlet = outlet
        await outlet.attach(partial(self.deliver, stream), Replay(known, known), stream)
        sender.through = outlet
        return await sender.link(
            Link(None, line.session, (), self._chain.replay([0] * self._chain.rows))
        )

    async def _extend(self, index: int, replay: Replay, logged: tuple[int, ...]) -> None:
        """Where the log of hop ``index`` was too short for its receiver, replay through it."""
        chain = self._chain
        lacking = tuple(
            max(start, have) if have < committed and start < committed else committed
            for start, have, committed in zip(replay.start, logged, replay.committed, strict=True)
        )
        short = any(map(int.__lt__, logged, replay.committed))
        if lacking == replay.committed and not (short and chain.pending()):
            return  # a log that is too short has not kept what is under way either
        if chain.rows > 1:  # all rows, so that no hop mixes two arrangements of them
            lacking = (0,) * chain.rows
        # As it is now: a step that was pending may have come out meanwhile.
        again = chain.replay(lacking)
        line = chain.lines[index]
        outlet = chain.head if index == 0 else chain.lines[index - 1].through
        if outlet is not None:
            await self._feed_again(line, outlet, again)
            return
        sender = chain.lines[index - 1]
        try:
            more = await sender.link(self.to(line, again))
        except LinkFailed as failed:
            raise PeerGone(str(failed), peer_id=line.peer_id) from None
        await self._extend(index - 1, again, more)

    async def _feed_again(self, line: Line, outlet: Outlet, replay: Replay) -> None:
        stream = await open_feed(self.dial, line.peer_id, (), line.session)
        line.outlet = outlet
        await outlet.attach(partial(self.deliver, stream), replay, stream)

    def lost_next(self, line: Line, session: bytes, why: str) -> None:
        """A hop says that it lost its next one. Whether that one is dead, its own stream tells."""
        chain = self._chain
        index = chain.lines.index(line) + 1 if line in chain.lines else len(chain.lines)
        following = chain.lines[index] if index < len(chain.lines) else None
        if following is None or following.session != session:
            return  # it was replaced meanwhile, or is none of ours
        following.feeder = None
        if chain.setup.replacements is None:
            cause = f"Peer {line.peer_id} lost its next hop {following.peer_id}: {why}"
            gone = PeerGone(cause, peer_id=following.peer_id)
            chain.lose(following, gone)
        chain.wake()

    def leave(self, line: Line) -> None:
        """A hop is about to go, or slow: move away from it while it still serves."""
        if self._chain.setup.replacements is not None and not line.leaving:
            line.leaving = True
            self._chain.start(self._moves.move_away, line)

    def note_took(self, took_us: Sequence[int]) -> None:
        """What each hop needed for one token."""
        for line, one in zip(self._chain.lines, took_us, strict=True):
            line.took_s = one / 1e6 if line.took_s is None else line.took_s * 0.9 + one / 1e7
            line.tokens += 1

    def look_for_slow(self) -> None:
        """Leave a hop that takes far longer than another would."""
        replacements = self._chain.setup.replacements
        now = trio.current_time()
        if replacements is None or now < self._look_at:
            return
        self._look_at = now + LOOK_S
        for line in self._chain.lines:
            if line.took_s is None or line.tokens < LOOK_TOKENS or line.leaving:
                continue
            replacements.observe(line.hop, line.took_s)
            if replacements.is_slow(line.hop, line.took_s):
                self.leave(line)

    def rolled_back(self, committed: Sequence[int], rearranged: bool) -> None:
        """Who is being brought up to date must have what was changed since once more."""
        for line in (*self._chain.lines, *self._moves.standing_by):
            if line.held is not None:
                line.held = (
                    [0] * len(line.held) if rearranged else [*map(min, line.held, committed)]
                )

    async def deliver(self, stream: FrameStream, step: Step, hidden: torch.Tensor) -> None:
        if step.seq == 0 or self._chain.is_wanted(step.seq):
            await send_step(stream, step, hidden)

    async def dial(self, peer: str, addrs: tuple[str, ...], protocol: str) -> FrameStream:
        return await self._chain.setup.opener.open_stream(peer, protocol)

    def to(self, line: Line, replay: Replay, *, spare: bool = False) -> Link:
        """The link that has a hop push to ``line``."""
        return Link(line.peer_id, line.session, self._addrs(line.peer_id), replay, spare)

    def _addrs(self, peer_id: str) -> tuple[str, ...]:
        setup = self._chain.setup
        if setup.replacements is not None:
            return setup.replacements.addrs(peer_id)
        return (setup.addrs or {}).get(peer_id, ())

    def avoided(self) -> dict[str, PeerError]:
        now = trio.current_time()
        self._avoid = {p: entry for p, entry in self._avoid.items() if entry[0] > now}
        return {peer: error for peer, (_, error) in self._avoid.items()}

    def _give_up(self, error: PeerError) -> None:
        """Do not ask that peer again for a while; and let the node draw its conclusions."""
        self._avoid[error.peer_id] = (trio.current_time() + AVOID_S, error)
        for line in self._chain.lines:
            if line.peer_id == error.peer_id:
                line.lose(error)
        if self._chain.setup.replacements is not None:
            self._chain.setup.replacements.blame(error)

    def _feeder(self, index: int) -> object:
        """Who is to push to hop ``index``."""
        return self._chain.lines[index - 1] if index else self._chain

    def _is_whole(self) -> bool:
        lines = self._chain.lines
        return all(
            line.lost is None and line.feeder is self._feeder(index)
            for index, line in enumerate(lines)
        )

    def _raise_lost(self) -> None:
        for line in self._chain.lines:
            if line.lost is not None:
                raise line.lost

    def _replayed_tokens(self) -> int:
        outlets = {self._chain.head, *(x.through for x in self._chain.lines if x.through)}
        return sum(outlet.replayed_tokens for outlet in outlets)

    def _report(self, lost: Mapping[str, PeerError], started: float, tokens: int) -> None:
        position = max(self._chain.committed)
        stall_ms = (trio.current_time() - started) * 1000
        event = Recovered(position, [peer for peer in lost if peer], stall_ms, tokens)
        self._report_hops(event)

    def _report_hops(self, event: Recovered | None) -> None:
        if self._chain.setup.replacements is not None:
            self._chain.setup.replacements.report(event, self._chain.hops)
