"""Mending a chain: lost hops are replaced, links made anew, and only what is lacking is sent again.

Everything runs in the task that awaits an output, so there is one view of the chain and no race
with the steps. Links are made from the tail to the head (``links.py``), each with a replay of what
its receiver lacks (design.md section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Protocol

import trio

from petalnode.errors import PeerError, PeerGone, PeerRefused
from petalnode.events import Recovered
from petalnode.nurseries import plain_errors
from petalnode.routing.chain import Gap, Hop
from petalnode.session.avoided import Avoided
from petalnode.session.line import Line, open_line, tuning_deadline_s
from petalnode.session.links import Links
from petalnode.session.moves import Moves
from petalnode.session.stuck import StuckSteps

if TYPE_CHECKING:
    from petalnode.session.chain import Chain

MEND_DEADLINE_S = 120.0
"""For a chain to be whole again; waiting for a node that holds the blocks counts."""
MAX_ATTEMPTS = 64
HOLE_S = 0.5
"""A chain that found nobody for its lost blocks for so long, or that nobody mended because no step
was asked for, does not hold hops that drain: one of them may be who comes to serve these blocks."""
LOOK_S = 2.0
"""How often a chain looks for a slow hop."""
DIRECT_S = 30.0
"""How often hops that the client relays between try to reach each other again."""
LOOK_TOKENS = 8
"""Tokens that a hop must have been measured on."""
MAX_GAPS = 4
"""How often a hop may say that it lacks something, with nothing coming out in between."""
OPEN_DEADLINE_S = 15.0
"""For every hop of a new chain to accept the session and reach the next; what the client adds has
its own time."""


class Replacements(Protocol):
    """Who finds other hops for a chain, and keeps account of peers."""

    async def find(self, gap: Gap, avoid: Mapping[str, PeerError]) -> Sequence[Hop]:
        """Hops that cover the blocks of ``gap``, none of them in ``avoid``.

        Waits, and says for what, while there are none; ``avoid`` gets shorter with time. Raises
        ``NoRoute`` past a deadline.
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
        self.links = Links(chain)
        self.avoided = Avoided()
        self.stuck = StuckSteps(chain)
        self._look_at = self._direct_at = 0.0
        self._moves = Moves(chain, self)

    async def open(self, hops: Sequence[Hop]) -> None:
        """Open all hops at once, then link them. Raises what the first failing hop failed with."""
        chain = self._chain
        in_s = OPEN_DEADLINE_S + tuning_deadline_s(chain.setup.tuning)
        with trio.move_on_after(in_s) as deadline:
            chain.lines[:] = await self.open_lines(hops, chain.setup.client)
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    for index in range(len(chain.lines)):
                        nursery.start_soon(self.links.connect, index)
        if deadline.cancelled_caught:
            raise PeerGone(f"The chain did not open in {in_s:.0f} s.")
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
        if not await self._replace_lost():
            return
        for index in reversed(range(len(self._chain.lines))):
            line = self._chain.lines[index]
            if line.lost is not None:
                raise line.lost
            if line.feeder is not self.links.feeder(index):
                await self.links.connect(index)

    async def _replace_lost(self) -> bool:
        """Open hops in the place of each run of lost ones; False if more were lost meanwhile."""
        lines = self._chain.lines
        runs = groupby(lines, key=lambda line: line.lost is not None)
        for run in [list(group) for is_lost, group in runs if is_lost]:
            hops = await self._find(self.gap(run))
            if not hops:
                return False
            at = lines.index(run[0])
            sender = lines[at - 1].peer_id if at else self._chain.setup.client
            lines[at : at + len(run)] = await self.open_lines(hops, sender)
        return True

    async def _find(self, gap: Gap) -> Sequence[Hop]:
        """Hops for a gap; none if it got wider, because hops that drain were let go meanwhile."""
        replacements = self._chain.setup.replacements
        assert replacements is not None
        hops: Sequence[Hop] = ()
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hold_nobody, nursery.cancel_scope)
                hops = await replacements.find(gap, self.avoided)
                nursery.cancel_scope.cancel()
        return hops

    async def _hold_nobody(self, search: trio.CancelScope) -> None:
        await trio.sleep(HOLE_S)
        while not self._let_go():
            await self._chain.news()
        search.cancel()

    def _let_go(self) -> bool:
        """Give up every hop that drains; whether there was one."""
        going = [line for line in self._chain.lines if line.drains and line.lost is None]
        for line in going:
            cause = f"Peer {line.peer_id} is about to leave."
            self._chain.lose(line, PeerRefused(cause, "", line.peer_id, "draining"))
        return bool(going)

    def look_for_holes(self) -> None:
        """A hop is lost, or drains: if no step is asked for, nobody mends the chain for now."""
        if self._chain.setup.replacements is not None:
            self._chain.start(self._look_for_holes)

    async def _look_for_holes(self) -> None:
        await trio.sleep(HOLE_S)
        is_cut = any(line.lost is not None for line in self._chain.lines)
        if is_cut and not self._chain.stepping.locked():
            self._let_go()

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
            opened[index] = await open_line(setup, hops[index], senders[index])

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

    def drains(self, line: Line) -> None:
        """A hop is about to go."""
        line.drains = True
        self.leave(line)
        self.look_for_holes()
        self._chain.wake()

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

    def look_for_relays(self) -> None:
        """Now and then, have hops that are relayed try to do without."""
        lines = self._chain.lines
        relayed = [two for one, two in pairwise(lines) if one.through is not None]
        now = trio.current_time()
        if not relayed or not self._direct_at:
            self._direct_at = now + DIRECT_S if relayed else 0.0
        elif now >= self._direct_at:
            self._direct_at = now + DIRECT_S
            for line in relayed:
                self._chain.start(self._moves.link_directly, line)

    def rolled_back(self, committed: Sequence[int], rearranged: bool) -> None:
        """Who is being brought up to date must have what was changed since once more."""
        limit = [0] * len(committed) if rearranged else committed
        for line in (*self._chain.lines, *self._moves.standing_by):
            line.cut(limit)

    def lacks(self, line: Line, why: str) -> None:
        """A hop says that something is missing before what it was sent: it is fed anew. Its sender
        lost that, or somebody before; it is not to blame unless it says so again and again."""
        line.gaps += 1
        if line.gaps > MAX_GAPS or line not in self._chain.lines:
            cause = f"Peer {line.peer_id} cannot go on: {why}."
            self._chain.lose(line, PeerRefused(cause, "", line.peer_id, "gap"))
            return
        line.held, line.feeder = [0] * self._chain.rows, None
        self._chain.wake()

    def _give_up(self, error: PeerError) -> None:
        """Do not ask that peer again for a while; and let the node draw its conclusions."""
        self.avoided.add(error)
        for line in self._chain.lines:
            if line.peer_id == error.peer_id:
                line.lose(error)
        if self._chain.setup.replacements is not None:
            self._chain.setup.replacements.blame(error)

    def _is_whole(self) -> bool:
        lines = self._chain.lines
        return all(
            line.lost is None and line.feeder is self.links.feeder(index)
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
