"""Where a step is that does not come out of the chain: lost on its way, or with a hop that hangs.

A connection that is silent is noticed by ``p2p.yamux``; this is for what that cannot see, and for
what it sees later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from petalnode.errors import PeerError
from petalnode.protocol import Step
from petalnode.session.line import Line, Whereabouts, stuck

if TYPE_CHECKING:
    from petalnode.session.chain import Chain

STUCK_S = 4.0
"""A hop whose step does not come out, and that computes nothing else either, is given up after so
long, or ``STUCK_STEPS`` usual steps; each further token of the step gives it more time."""
STUCK_STEPS = 6.0
STUCK_TOKEN_S = 0.5


@dataclass(frozen=True)
class _Stuck:
    """A hop that has a step, and how many tokens it had computed, since when."""

    line: Line
    done: int
    since: float


class StuckSteps:
    """The questions of one chain."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._stuck: _Stuck | None = None
        self._sent_again = 0

    def forget(self) -> None:
        """The chain was mended: nobody is known to hang."""
        self._stuck = None

    async def look(self, step: Step, usual_s: float) -> bool:
        """No output for long: ask every hop what came and went, and see where the step is.

        ``usual_s``: what a step takes. Returns whether it was lost on its way, so that it will be
        sent again.
        """
        places: dict[Line, Whereabouts] = {}

        async def ask(line: Line) -> None:
            try:
                places[line] = await line.where()
            except PeerError as error:
                self._chain.lose(line, error)

        async with trio.open_nursery() as nursery:
            for line in self._chain.lines:
                nursery.start_soon(ask, line)
        for line in self._chain.lines:
            if line.lost is not None or line not in places:
                return False
            place = places[line]
            if place.seen < step.seq:
                self._send_again(line, step)
                return True
            if place.sent < step.seq:
                patience_s = max(STUCK_S, STUCK_STEPS * usual_s)
                patience_s += STUCK_TOKEN_S * (step.tokens - 1)
                self._wait_for(line, place.done, patience_s)
                return False
        return False

    def _send_again(self, line: Line, step: Step) -> None:
        """A step was lost on its way to a hop: its sender has it, or else the client."""
        lines = self._chain.lines
        for one in lines[: lines.index(line)] if self._sent_again == step.seq else ():
            one.feeder = one.through = None
        line.feeder = None
        self._sent_again = step.seq

    def _wait_for(self, line: Line, done: int, patience_s: float) -> None:
        """A hop computes long; if nothing comes of it, it is given up."""
        now = trio.current_time()
        if self._stuck is None or (self._stuck.line, self._stuck.done) != (line, done):
            self._stuck = _Stuck(line, done, now)
        elif now - self._stuck.since >= patience_s:
            self._chain.lose(line, stuck(line.peer_id, now - self._stuck.since))
