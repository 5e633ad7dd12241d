"""The client's side of one hop: its control stream, and questions with their answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

import trio

from petalnode.errors import PeerError, PeerGone, PeerMisbehaved, PeerRefused
from petalnode.models.tuning.tuning import Tuning
from petalnode.outlet import Outlet
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import (
    HOP_PROTOCOL,
    MAX_TEXT,
    SESSION_ID_BYTES,
    BadMessage,
    Link,
    Open,
    max_payload_bytes,
    wholes,
)
from petalnode.replay import Kept
from petalnode.routing.chain import Hop
from petalnode.tuning_wire import pack

if TYPE_CHECKING:
    from petalnode.session.chain import ChainSetup

OPEN_HOP_DEADLINE_S = 8.0
"""For one hop to accept a session; it alone is to blame otherwise."""
TUNING_DEADLINE_S = 10.0
"""For one hop to take the matrices that the client adds to its blocks, beside the time they need on
a line of ``SLOWEST_UPLINK`` bytes a second."""
SLOWEST_UPLINK = 250_000
ANSWER_DEADLINE_S = 4.0
"""For a hop to answer what costs it nothing: with ``chain.PATIENCE_S`` before it no more than the
silence that a connection is allowed (``p2p.yamux``)."""
LINK_ANSWER_DEADLINE_S = 120.0
"""For a hop to reach its next and replay what that lacks; a hop that is gone is noticed sooner."""
MAX_LINE_ROWS = 1 << 24
MAX_COUNT = 1 << 53


class Opener(Protocol):
    """The part of the host that a chain needs."""

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A new stream to ``peer_id``."""


@dataclass(frozen=True)
class Whereabouts:
    """The last step that came to a hop, the last that went on, and tokens computed for anybody."""

    seen: int
    sent: int
    done: int


class LinkFailed(Exception):
    """A hop could not reach its next one; it is not known whose fault that is."""


class _Answer:
    """What a hop said to one question."""

    def __init__(self) -> None:
        self.came = trio.Event()
        self.header: Mapping[str, Any] = {}
        self.error: Exception | None = None


class Line:
    """One hop of a chain, as its client holds it.

    ``lost`` is why the hop is to be replaced. ``feeder``: the line that pushes to it, or the chain,
    where the client does. ``held``: how much of each row it surely has, None when that is all there
    is. ``fed_since``: the last step that was sent before it was fed by who feeds it now (infinite:
    nobody does yet); once a later one has come out of the chain, it has everything. ``gaps``: how
    often it said since then that it lacks something. ``coming``: how much it will have when it has
    taken what was sent. ``outlet``: where the client itself feeds it. ``through``: where the client
    passes on what the hop gives back. ``leaving``: it is being moved away from. ``drains``: it
    said that it goes. ``search``: for another in its place, while it still serves.
    """

    def __init__(
        self, hop: Hop, control: FrameStream, session: bytes, rows: int, sender: str
    ) -> None:
        self.hop = hop
        self.session = session
        self.control = control
        self.expects = sender
        self.lost: PeerError | None = None
        self.feeder: object = None
        self.fed_since: float = inf
        self.gaps = 0
        self.held: list[int] | None = [0] * rows
        self.coming = [0] * rows
        self.leaving = self.drains = False
        self.search = trio.CancelScope()
        self.outlet: Outlet | None = None
        self.through: Outlet | None = None
        self.took_s: float | None = None
        self.tokens = 0
        self._questions: dict[str, deque[_Answer]] = {}

    @property
    def peer_id(self) -> str:
        return self.hop.peer_id

    def cut(self, limit: Sequence[int]) -> None:
        """Rows were changed beyond ``limit``: what it has of that, or will have, is void."""
        if self.held is not None:
            self.held = [*map(min, self.held, limit)]
        self.coming = [*map(min, self.coming, limit)]

    def came_out(self, seq: int) -> None:
        """A step came out of the chain: if it was sent through this hop, nothing is lacking."""
        if seq > self.fed_since:
            self.held, self.gaps = None, 0

    async def expect(self, peer: str) -> None:
        """Tell the hop who feeds it from now on."""
        await self._expect(peer, also=False)
        self.expects = peer

    async def expect_also(self, peer: str) -> None:
        """Tell the hop who may feed it soon."""
        await self._expect(peer, also=True)

    async def _expect(self, peer: str, also: bool) -> None:
        message = {"type": "expect", "peer": peer, "also": also}
        await self._ask(message, "expecting", ANSWER_DEADLINE_S)

    async def link(self, link: Link) -> Kept:
        """Have the hop push to another; what its log held for that.

        Raises ``LinkFailed`` if it cannot reach that one.
        """
        answer = await self._ask(link.to_wire(), link_key(link.session), LINK_ANSWER_DEADLINE_S)
        rows = len(link.replay.start)
        logged = wholes(answer.get("logged"), rows, MAX_LINE_ROWS)
        if len(logged) != rows:
            raise misbehaved(self.peer_id, "it says nothing of some rows")
        return Kept(logged, answer.get("complete") is True)

    async def where(self) -> Whereabouts:
        """How far the session's steps are at the hop, and whether it gets anywhere."""
        answer = await self._ask({"type": "where"}, "at", ANSWER_DEADLINE_S)
        numbers = [answer.get("seen"), answer.get("sent"), answer.get("done", 0)]
        return Whereabouts(*wholes(numbers, 3, MAX_COUNT))

    async def reach(self, lengths: tuple[int, ...], deadline_s: float) -> None:
        """Wait until the hop's rows are so long."""
        await self._ask({"type": "reach", "lengths": list(lengths)}, "reached", deadline_s)

    def take_answer(self, kind: str, header: Mapping[str, Any]) -> None:
        """The hop answered. Raises ``BadMessage`` if nobody asked."""
        waiting = self._questions.get(kind)
        if not waiting:
            raise BadMessage("an answer that nobody asked for")
        answer = waiting.popleft()
        answer.header = header
        answer.came.set()

    def take_link_error(self, session: bytes, why: str) -> None:
        """The hop could not make a link."""
        waiting = self._questions.get(link_key(session))
        if not waiting:
            raise BadMessage("an error of a link that nobody asked for")
        answer = waiting.popleft()
        answer.error = LinkFailed(why)
        answer.came.set()

    def lose(self, error: PeerError) -> None:
        """The hop is to be replaced; the first reason stays."""
        self.lost = self.lost or error
        self.search.cancel()
        self.control.reset()
        if self.outlet is not None:
            self.outlet.detach()
        for waiting in self._questions.values():
            for answer in waiting:
                answer.error = self.lost
                answer.came.set()
            waiting.clear()

    async def _ask(
        self, message: dict[str, Any], kind: str, deadline_s: float
    ) -> Mapping[str, Any]:
        if self.lost is not None:
            raise self.lost
        answer = _Answer()
        self._questions.setdefault(kind, deque()).append(answer)
        try:
            with trio.move_on_after(deadline_s) as scope:
                await self.control.send(message)
                await answer.came.wait()
            if scope.cancelled_caught:
                self.lose(silent(self.peer_id, deadline_s))
        finally:
            if answer in self._questions[kind]:  # its late answer must not go to the next question
                self._questions[kind][self._questions[kind].index(answer)] = _Answer()
        if answer.error is not None:
            raise answer.error
        if self.lost is not None:
            raise self.lost
        return answer.header


async def open_line(setup: ChainSetup, hop: Hop, sender: str) -> Line:
    """Open a session on one hop, fed by ``sender``. Raises ``PeerError`` that names the hop."""
    session = setup.rng.randbytes(SESSION_ID_BYTES)
    fed_by = None if sender == setup.client else sender
    opened = Open(session, setup.fingerprint, hop.start, hop.end, setup.rows, fed_by, setup.adapter)
    stream: FrameStream | None = None
    try:
        with trio.fail_after(OPEN_HOP_DEADLINE_S):
            stream = await setup.opener.open_stream(hop.peer_id, HOP_PROTOCOL)
            await stream.send(opened.to_wire())
            check_opened(hop.peer_id, await stream.receive())
    except trio.TooSlowError:
        if stream is not None:
            stream.reset()
        raise PeerGone(
            f"Peer {hop.peer_id} did not open a session in {OPEN_HOP_DEADLINE_S:.0f} s.",
            peer_id=hop.peer_id,
        ) from None
    except BaseException:
        if stream is not None:
            stream.reset()
        raise
    await send_tuning(stream, setup, hop)
    return Line(hop, stream, session, setup.rows, sender)


async def send_tuning(stream: FrameStream, setup: ChainSetup, hop: Hop) -> None:
    """Have the hop add the client's own matrices to its blocks. Raises ``PeerError``."""
    tuning = setup.tuning.within(hop.start, hop.end)
    if not tuning.blocks:
        return
    deadline_s = tuning_deadline_s(setup.tuning)  # all hops' parts go up one line at once
    try:
        with trio.fail_after(deadline_s):
            for header, tensors in pack(tuning, max_payload_bytes(setup.hidden_size)):
                await stream.send(header, tensors)
            check_tuned(hop.peer_id, await stream.receive())
    except trio.TooSlowError:
        stream.reset()
        raise PeerGone(
            f"Peer {hop.peer_id} did not take the adapter in {deadline_s:.0f} s.",
            peer_id=hop.peer_id,
        ) from None
    except BaseException:
        stream.reset()
        raise


def tuning_deadline_s(tuning: Tuning) -> float:
    """How long matrices may be on their way; nothing for none."""
    return TUNING_DEADLINE_S + tuning.nbytes / SLOWEST_UPLINK if tuning.blocks else 0.0


def check_tuned(peer_id: str, frame: Frame | None) -> None:
    """Raise unless the hop said ``tuned``."""
    if frame is None:
        raise PeerGone(f"Peer {peer_id} closed the session at once.", peer_id=peer_id)
    kind = frame.header.get("type")
    if kind == "error":
        why, code = words(frame.header, "why"), words(frame.header, "code")
        remedy = "" if code == "busy" else "Use an adapter of this model, or a smaller one."
        raise PeerRefused(f"Peer {peer_id} refused the adapter: {why}.", remedy, peer_id, code)
    check_not_draining(peer_id, kind)
    if kind != "tuned":
        raise misbehaved(peer_id, "it did not answer to an adapter")


def check_not_draining(peer_id: str, kind: object) -> None:
    """Raise if, between our asking and its answer, the hop said that it leaves."""
    if kind == "draining":
        raise PeerRefused(f"Peer {peer_id} is about to leave.", "", peer_id, "draining")


def link_key(session: bytes) -> str:
    """What the answer to a link is told apart by."""
    return f"linked {session.hex()}"


def check_opened(peer_id: str, frame: Frame | None) -> None:
    """Raise unless the hop said ``opened``."""
    if frame is None:
        raise PeerGone(f"Peer {peer_id} closed the session at once.", peer_id=peer_id)
    kind = frame.header.get("type")
    if kind == "refused":
        why, code = words(frame.header, "why"), words(frame.header, "code")
        raise PeerRefused(f"Peer {peer_id} refused the session: {why}.", "", peer_id, code)
    check_not_draining(peer_id, kind)
    if kind != "opened":
        raise misbehaved(peer_id, "it answered neither opened nor refused")


def words(header: Mapping[str, Any], key: str) -> str:
    """Printable, bounded text that a peer sent."""
    value = header.get(key, "")
    if not isinstance(value, str):
        return "(no text)"
    return "".join(char if char.isprintable() else "?" for char in value[:MAX_TEXT])


def misbehaved(peer_id: str, what: str) -> PeerMisbehaved:
    return PeerMisbehaved(f"Peer {peer_id} broke the hop protocol: {what}.", peer_id=peer_id)


def silent(peer_id: str, seconds: float) -> PeerGone:
    return PeerGone(f"Peer {peer_id} said nothing for {seconds:.0f} s.", peer_id=peer_id)


def stuck(peer_id: str, seconds: float) -> PeerGone:
    return PeerGone(f"Peer {peer_id} computed nothing for {seconds:.0f} s.", peer_id=peer_id)
