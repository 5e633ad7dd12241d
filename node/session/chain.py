"""The client's end of a chain: steps go in, outputs come back, whatever dies on the way.

The client holds a control stream and a reader task for each hop (`line.py`) and feeds the first
one; hops feed each other, and the last returns outputs on its control stream. What must be mended
is noticed here and done in `recovery.py`, between two looks at the output that is awaited.
``open_chain`` owns the nursery; leaving it resets every stream, which frees the session's caches
on every hop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random, SystemRandom

import torch
import trio

from petalnode.errors import PeerError, PeerGone, PeerRefused, UsageError
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.nurseries import plain_errors
from petalnode.outlet import Outlet
from petalnode.p2p.frames import Frame
from petalnode.protocol import (
    MAX_PENDING,
    MAX_STEP_TOKENS,
    BadMessage,
    Replay,
    Segment,
    Step,
    session_id,
)
from petalnode.replay import ReplayLog, Source
from petalnode.routing.chain import Hop
from petalnode.serving.budget import KvBudget
from petalnode.session.line import Line, Opener, link_key, misbehaved, words
from petalnode.session.recovery import Mender, Replacements

PATIENCE_S = 2.0
"""Without any output for so long, or ``PATIENCE_STEPS`` usual steps, the hops are asked; each time
that this found a step to send again, for twice as long as before: it may be on its way."""
PATIENCE_STEPS = 6.0
RELAY_LOG_TOKENS = 1 << 20
"""Hidden states that a client without token ids, or one that relays, remembers."""
WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What hops take hidden states in."""


@dataclass(eq=False)
class _Awaited:
    """One step on its way through the chain."""

    step: Step
    hidden: torch.Tensor | None = None

    @property
    def wanted(self) -> int:
        return sum(segment.want for segment in self.step.segments)


class Chain:
    """An open chain. One ``forward`` at a time. Made by ``open_chain``."""

    def __init__(self, setup: ChainSetup, nursery: trio.Nursery) -> None:
        self.setup = setup
        self.lines: list[Line] = []
        self.committed = [0] * setup.rows
        self.head = Outlet(setup.source or ReplayLog(setup.rows, relay_budget()), self._lost_feed)
        self.stepping = trio.Lock()
        self.unmended: PeerError | None = None
        self._nursery = nursery
        self._awaited: dict[int, _Awaited] = {}
        self._given_up: deque[int] = deque(maxlen=MAX_PENDING)
        self._seq = 0
        self._news = trio.Event()
        self._usual_s = 0.0
        self._mender = Mender(self)
        nursery.start_soon(self.head.run)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The hops as they are now."""
        return tuple(line.hop for line in self.lines)

    @property
    def rows(self) -> int:
        return self.setup.rows

    @property
    def last_seq(self) -> int:
        """Of the steps that were sent so far."""
        return self._seq

    async def forward(
        self, segments: Sequence[Segment], hidden: torch.Tensor, order: Sequence[int] = ()
    ) -> torch.Tensor:
        """Run ``hidden`` [T, H] of ``segments``, in order, through all hops.

        ``order`` rearranges rows of equal length before: row i goes on from row ``order[i]``.
        Returns [W, H], the outputs that the segments want, in order. Hops that are lost meanwhile
        are replaced. Raises what cannot be mended: ``PeerError`` or ``NoRoute``; ``UsageError``
        for what no hop would take.
        """
        async with self.stepping:
            check_input(segments, hidden, self.setup.hidden_size)
            check_segments(segments, self.committed, order)
            sent: list[_Awaited] = []
            try:
                await self._mender.mend()
                self._begin(segments, order)
                offset = 0
                for chunk in chunks(segments, MAX_STEP_TOKENS):
                    tokens = sum(segment.n for segment in chunk)
                    if len(sent) >= MAX_PENDING:
                        await self._arrival(sent[-MAX_PENDING])
                    await self._mender.mend()  # a long prompt need not be sent to its end first
                    part = hidden[offset : offset + tokens]
                    sent.append(await self._send(chunk, part, () if sent else order))
                    offset += tokens
                parts = [await self._arrival(awaited) for awaited in sent]
            finally:
                for awaited in sent:
                    if self._awaited.pop(awaited.step.seq).hidden is None:
                        self._given_up.append(awaited.step.seq)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def pending(self) -> tuple[Step, ...]:
        """The steps whose outputs are still awaited, in order."""
        return tuple(a.step for a in self._awaited.values() if a.hidden is None)

    def is_wanted(self, seq: int) -> bool:
        """Whether a step was not given up. One that came out still goes where it is lacking."""
        return seq not in self._given_up

    def replay(self, held: Sequence[int] | None) -> Replay:
        """What a receiver needs that has so much of each row (None: all) already."""
        start = self.committed if held is None else map(min, held, self.committed)
        pending = self.pending()
        if any(step.order for step in pending):  # who has gone through it, nobody knows
            start = [0] * self.rows
        return Replay(tuple(start), tuple(self.committed), pending)

    def start_line(self, line: Line) -> None:
        """Read what a new hop says, to its end."""
        self._nursery.start_soon(self._read, line)

    def start(self, task: object, *args: object) -> None:
        """Run something for as long as the chain is open."""
        self._nursery.start_soon(task, *args)  # type: ignore[arg-type]

    def new_outlet(self) -> Outlet:
        """For what the client passes on from a hop to the next."""
        outlet = Outlet(ReplayLog(self.rows, relay_budget()), self._lost_feed)
        self._nursery.start_soon(outlet.run)
        return outlet

    def lose(self, line: Line, error: PeerError) -> None:
        """Give a hop up; whoever awaits an output sees to the rest."""
        line.lose(error)
        self._mender.look_for_holes()
        self.wake()

    async def news(self) -> None:
        """Until something happens."""
        await self._news.wait()

    def wake(self) -> None:
        """Something happened: look again."""
        news, self._news = self._news, trio.Event()
        news.set()

    def _begin(self, segments: Sequence[Segment], order: Sequence[int]) -> None:
        if order:
            self.committed = [self.committed[source] for source in order]
        for segment in segments:
            self.committed[segment.row] = min(self.committed[segment.row], segment.position)
        self._mender.rolled_back(self.committed, rearranged=bool(order))

    async def _send(
        self, chunk: Sequence[Segment], hidden: torch.Tensor, order: Sequence[int]
    ) -> _Awaited:
        self._seq += 1
        awaited = _Awaited(Step(self._seq, tuple(chunk), order=tuple(order)))
        self._awaited[self._seq] = awaited
        await self.head.put(awaited.step, hidden)
        return awaited

    async def _arrival(self, awaited: _Awaited) -> torch.Tensor:
        started = trio.current_time()
        patience_s = max(PATIENCE_S, PATIENCE_STEPS * self._usual_s)
        while awaited.hidden is None:
            await self._mender.mend()
            if awaited.hidden is not None:
                break
            with trio.move_on_after(patience_s) as scope:
                await self._news.wait()
            if scope.cancelled_caught and await self._mender.stuck.look(
                awaited.step, self._usual_s
            ):
                patience_s *= 2
        self._mender.look_for_slow()
        self._mender.look_for_relays()
        self._usual_s += (trio.current_time() - started - self._usual_s) / 8
        return awaited.hidden

    async def _lost_feed(self, error: PeerError) -> None:
        """A stream on which the client feeds a hop broke."""
        for line in self.lines:
            if line.peer_id == error.peer_id and line.outlet is not None:
                line.feeder = None
        self.wake()

    async def _read(self, line: Line) -> None:
        """One hop's control stream, to its end. Failures are kept, never raised."""
        try:
            while (frame := await line.control.receive()) is not None:
                await self._take(line, frame)
            gone = PeerGone(f"Peer {line.peer_id} closed the session.", peer_id=line.peer_id)
            self.lose(line, gone)
        except PeerError as error:
            self.lose(line, error)
        except BadMessage as bad:
            self.lose(line, misbehaved(line.peer_id, str(bad)))

    async def _take(self, line: Line, frame: Frame) -> None:
        kind = frame.header.get("type")
        if kind == "out":
            self._take_output(line, Step.parse(frame.header, self.rows), frame)
        elif kind == "through":
            await self._take_through(line, Step.parse(frame.header, self.rows), frame)
        elif kind == "linked":
            line.take_answer(link_key(session_id(frame.header)), frame.header)
        elif kind in ("expecting", "at", "reached"):
            line.take_answer(kind, frame.header)
        elif kind == "error":
            self._take_error(line, frame)
        elif kind == "draining":
            self._mender.drains(line)
        else:
            raise BadMessage("a message of unknown type")

    def _take_error(self, line: Line, frame: Frame) -> None:
        code, why = words(frame.header, "code"), words(frame.header, "why")
        if code == "link":
            line.take_link_error(session_id(frame.header), why)
        elif code == "next":
            self._mender.lost_next(line, session_id(frame.header), why)
        elif code == "gap":
            self._mender.lacks(line, why)
        else:
            error = PeerRefused(
                f"Peer {line.peer_id} cannot go on ({code}): {why}.", "", line.peer_id, code
            )
            self.lose(line, error)

    def _take_output(self, line: Line, step: Step, frame: Frame) -> None:
        awaited = self._awaited.get(step.seq)
        if awaited is None or awaited.hidden is not None or line is not self.lines[-1]:
            return  # of a step that was given up, or has come already
        shape = (awaited.wanted, self.setup.hidden_size)
        if len(frame.tensors) != 1 or tuple(frame.tensors[0].shape) != shape:
            raise BadMessage(f"an output is not of shape {shape}")
        awaited.hidden = frame.tensors[0]
        for segment in awaited.step.segments:
            self.committed[segment.row] = segment.position + segment.n
        for one in self.lines:
            one.came_out(step.seq)
        if len(step.took) == len(self.lines) and step.tokens == 1:
            self._mender.note_took(step.took)
        self.wake()

    async def _take_through(self, line: Line, step: Step, frame: Frame) -> None:
        shape = (step.tokens, self.setup.hidden_size)
        if len(frame.tensors) != 1 or tuple(frame.tensors[0].shape) != shape:
            raise BadMessage(f"hidden states are not of shape {shape}")
        if line.through is not None:
            await line.through.put(step, frame.tensors[0])


@dataclass(frozen=True)
class ChainSetup:
    """What a chain is made of. ``source`` gives its inputs again; by default they are kept.

    ``client`` is our own peer id; session ids come from ``rng``. Without ``replacements`` a hop
    that is lost ends the chain. Every hop adds to its blocks the ``adapter`` of that name, which it
    offers, and the client's own ``tuning``.
    """

    opener: Opener
    client: str
    fingerprint: str
    hidden_size: int
    rows: int = 1
    addrs: Mapping[str, tuple[str, ...]] | None = None
    source: Source | None = None
    replacements: Replacements | None = None
    rng: Random = field(default_factory=SystemRandom)
    adapter: str = ""
    tuning: Tuning = NOTHING


def relay_budget() -> KvBudget:
    return KvBudget(RELAY_LOG_TOKENS, 1)


@asynccontextmanager
async def open_chain(setup: ChainSetup, hops: Sequence[Hop]) -> AsyncIterator[Chain]:
    """Open a session on every hop of a chain, link them, and close it all on leaving.

    Raises ``PeerUnreachable``, ``PeerRefused``, ``PeerGone`` or ``PeerMisbehaved``, naming the
    first hop that failed.
    """
    chain: Chain | None = None
    try:
        with plain_errors():
            async with trio.open_nursery() as nursery:
                chain = Chain(setup, nursery)
                await chain._mender.open(hops)
                yield chain
                nursery.cancel_scope.cancel()
    finally:
        for line in chain.lines if chain is not None else ():
            line.control.reset()


def check_input(segments: Sequence[Segment], hidden: torch.Tensor, hidden_size: int) -> None:
    """Raise ``UsageError`` for hidden states that hops do not take, one after the other."""
    shape = (sum(segment.n for segment in segments), hidden_size)
    if tuple(hidden.shape) != shape or hidden.dtype not in WIRE_DTYPES:
        raise UsageError(
            f"Hidden states of shape {tuple(hidden.shape)} and {hidden.dtype} are not those of "
            "the step.",
            f"Give {shape}, in float32, bfloat16 or float16.",
        )


def check_segments(
    segments: Sequence[Segment], lengths: Sequence[int], order: Sequence[int]
) -> None:
    """Raise ``UsageError`` for a step that rows of such lengths, once in ``order``, cannot take."""
    rows = range(len(lengths))
    fed = [segment.row for segment in segments]
    if not {*order, *fed} <= set(rows) or len(order) not in (0, len(rows)):
        raise UsageError(
            f"The rows {fed} cannot be fed after an order of {list(order)}.",
            f"Name rows from 0 to {len(rows) - 1}, and in an order one for each.",
        )
    if not fed or len(set(fed)) < len(fed):
        raise UsageError(f"A step cannot feed the rows {fed}.", "Feed at least one, and each once.")
    for one in segments:
        length = lengths[order[one.row] if order else one.row]
        if not (0 <= one.position <= length and 0 <= one.want <= one.n and one.n):
            raise UsageError(
                f"{one} does not fit a row of {length} positions.",
                "Begin where the row ends, or before, and want no more than is fed.",
            )


def chunks(segments: Sequence[Segment], size: int) -> list[list[Segment]]:
    """Cut segments so that no chunk has more than ``size`` tokens; order is kept.

    A row that is cut wants outputs of its last tokens only, wherever these fall.
    """
    result: list[list[Segment]] = [[]]
    room = size
    for segment in segments:
        done = 0
        while done < segment.n:
            n = min(room, segment.n - done)
            after = segment.n - done - n
            want = min(n, max(0, segment.want - after))
            result[-1].append(Segment(segment.row, segment.position + done, n, want))
            done += n
            room -= n
            if room == 0:
                result.append([])
                room = size
    return [chunk for chunk in result if chunk]
