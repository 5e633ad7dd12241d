"""Changing a chain while it serves: leaving a hop that drains or is slow, or a relay by the client.

The replacement is brought up to date beside the running chain; then, between two steps, the chain
is switched, which costs no more than a few round trips (design.md section 5, drain).
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import trio

from petalnode.errors import NoRoute, PeerError, PeerRefused
from petalnode.protocol import Replay
from petalnode.session.line import Line, LinkFailed

if TYPE_CHECKING:
    from petalnode.session.chain import Chain
    from petalnode.session.recovery import Mender

RETRY_S = 2.0
"""Between two attempts to move."""
CLOSE_TOKENS = 8
"""How far behind a replacement may be when the chain is switched."""
MAX_ROUNDS = 6
CATCH_UP_DEADLINE_S = 120.0


class Moves:
    """The moves of one chain. ``standing_by``: replacements that are being brought up to date."""

    def __init__(self, chain: Chain, mender: Mender) -> None:
        self.standing_by: list[Line] = []
        self._chain, self._mender = chain, mender

    async def move_away(self, line: Line) -> None:
        """Replace a hop that still works, however often that takes. Never raises ``PeerError``."""
        while line in self._chain.lines and line.lost is None:
            try:
                await self._try(line)
                return
            except (PeerError, NoRoute, LinkFailed, trio.TooSlowError):
                await trio.sleep(RETRY_S)

    async def link_directly(self, line: Line) -> None:
        """Ask the hop before a relayed one whether it reaches that now; if so, it feeds it."""
        chain = self._chain
        before = self._before(line)
        if before is None:
            return
        with suppress(PeerError, LinkFailed, trio.TooSlowError):
            await line.expect_also(before.peer_id)
            nothing = Replay(tuple(chain.committed), tuple(chain.committed))
            await before.link(self._mender.links.to(line, nothing, spare=True))
            async with chain.stepping:
                if self._before(line) is before and before.lost is None and line.held is None:
                    before.through = line.feeder = None  # the spare feed is taken
                    await self._mender.mend(moved=True)

    async def _try(self, line: Line) -> None:
        chain, replacements = self._chain, self._chain.setup.replacements
        assert replacements is not None
        leaving = PeerRefused(f"Peer {line.peer_id} is left.", peer_id=line.peer_id, code="leaving")
        avoid = self._mender.avoided.beside(leaving)
        with trio.CancelScope() as line.search:
            hops = await replacements.find(self._mender.gap([line]), avoid)
        if line.search.cancelled_caught:
            raise trio.TooSlowError
        before = self._before(line)
        sender = before.peer_id if before is not None else chain.setup.client
        new = await self._mender.open_lines(hops, sender)
        self.standing_by += new
        try:
            if chain.rows == 1:  # several do not hold still: they are replayed between two steps
                await self._catch_up(line, new, before)
            async with chain.stepping:
                switched = await self._switch(line, new, before)
        finally:
            for one in new:
                self.standing_by.remove(one)
                if one not in chain.lines:
                    one.control.reset()
        if not switched:
            raise trio.TooSlowError

    def _place(self, line: Line) -> int:
        """Where the hop is in the chain. Raises ``TooSlowError`` if it was replaced meanwhile."""
        if line not in self._chain.lines:
            raise trio.TooSlowError
        return self._chain.lines.index(line)

    def _before(self, line: Line) -> Line | None:
        index = self._place(line)
        return self._chain.lines[index - 1] if index else None

    async def _catch_up(self, line: Line, new: list[Line], before: Line | None) -> None:
        chain = self._chain
        for one, two in pairwise(new):
            await one.link(self._mender.links.to(two, chain.replay(two.held)))
            two.feeder, two.fed_since = one, chain.last_seq
        index = self._place(line)
        if index + 1 < len(chain.lines):
            await chain.lines[index + 1].expect_also(new[-1].peer_id)
        for _ in range(MAX_ROUNDS):
            reached = tuple(chain.committed)
            for one in new:
                one.coming = list(reached)
            if not await self._replay(new[0], before):
                return  # the log is too short: what is lacking comes with the switch
            await new[-1].reach(reached, CATCH_UP_DEADLINE_S)
            for one in new:
                one.held = list(one.coming)  # less than was sent, if it was rolled back meanwhile
            if max(map(int.__sub__, chain.committed, reached)) <= CLOSE_TOKENS:
                return

    async def _replay(self, first: Line, before: Line | None) -> bool:
        """Have the sender of the hop that is left replay to the first of those that stand by.

        Returns whether it has everything.
        """
        replay = self._chain.replay(first.held)
        outlet = self._chain.head if before is None else before.through
        if outlet is None:
            assert before is not None
            kept = await before.link(self._mender.links.to(first, replay, spare=True))
        else:
            stream = await self._mender.links.open_feed(first)
            kept = await outlet.bring_up(partial(self._mender.links.deliver, stream), replay)
        return kept.complete or all(map(int.__ge__, kept.lengths, replay.committed))

    async def _switch(self, line: Line, new: list[Line], before: Line | None) -> bool:
        """Put the new hops in the place of the old one, if the chain is still what it was."""
        chain = self._chain
        if line.lost is not None or self._before(line) is not before:
            return False
        index = self._place(line)
        chain.lines[index : index + 1] = new
        line.control.reset()
        await self._mender.mend(moved=True)
        return True
