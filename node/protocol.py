"""The hop protocol: what a client and the hops of its chain say to each other. No I/O here.

A hop is opened by its client on a **control** stream, which stays open as long as the session does:

    client → hop   open(session, fingerprint, blocks, rows, sender)  → opened | refused(code, why)
    client → hop   tuning(names, …) + matrices      add these to the blocks    → tuned | error
    client → hop   link(peer, session, replay, …)   push outputs to that peer → linked | error
    client → hop   expect(peer)                      be fed by that peer       → expecting
    client → hop   where()                           which steps came and went → at
    client → hop   reach(lengths)                    tell when rows are so long → reached
    hop → client   out(seq, segments) + hidden [W, H]      where nobody was linked: the last hop
    hop → client   through(seq, …)    + hidden [T, H]      where the client relays to the next hop
    hop → client   error(code, why, session)               what went wrong, on which link
    hop → client   draining()                              it is about to leave

Steps come on a **feed** stream that the hop's sender opens, the client or the previous hop:
``feed(session) → fed``, then ``step`` frames. A step carries segments ``(row, position, n, want)``:
``n`` tokens that extend that row at ``position``, or first truncate the row to it (design.md
section 5: indexed by position, idempotent). ``want`` is how many of the segment's last outputs the
client needs; the last hop returns just those, the others pass everything on. ``seq`` is the
client's own count and comes back with the output; nobody awaits a step of seq 0. ``order``
rearranges rows before the step, once: row i goes on from what row ``order[i]`` was.

Every sender remembers what it sent, by position (`petalnode.replay`). A link says what its
receiver lacks: rows from ``start`` on, up to ``committed``, in chunks of seq 0; then those of the
``pending`` steps that the sender has computed already, as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

HOP_PROTOCOL = "/petalnode/hop/1"

SESSION_ID_BYTES = 16
MAX_ROWS = 64
MAX_STEP_TOKENS = 256
"""Tokens a frame: a hop sets memory aside for no more; hops work on different frames at once."""
MAX_ADDRS = 16
MAX_ITEM_BYTES = 4
"""Of one number of a hidden state: float32."""
MAX_TEXT = 512
MAX_BLOCKS = 4096
MAX_POSITION = 1 << 24
MAX_SEQ = 1 << 48
MAX_PENDING = 64
"""Steps that a chain may have under way at once."""
MAX_TOOK_US = 1 << 40


def max_payload_bytes(hidden_size: int) -> int:
    """The longest payload that a step of a model may have."""
    return MAX_STEP_TOKENS * hidden_size * MAX_ITEM_BYTES


class BadMessage(ValueError):
    """The message breaks the protocol; the text says how."""


@dataclass(frozen=True)
class Segment:
    """``n`` tokens of ``row`` from ``position`` on, of which the last ``want`` are needed back."""

    row: int
    position: int
    n: int
    want: int

    def to_wire(self) -> list[int]:
        return [self.row, self.position, self.n, self.want]


@dataclass(frozen=True)
class Open:
    """Open blocks ``[start, end)`` for a session; ``sender`` feeds it (None: the client does).

    ``adapter`` names one that the node offers, to be added to its blocks.
    """

    session: bytes
    fingerprint: str
    start: int
    end: int
    rows: int
    sender: str | None = None
    adapter: str = ""

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": "open",
            "session": self.session,
            "fingerprint": self.fingerprint,
            "blocks": [self.start, self.end],
            "rows": self.rows,
            "sender": self.sender,
            "adapter": self.adapter,
        }

    @classmethod
    def parse(cls, header: Mapping[str, Any]) -> Open:
        blocks = header.get("blocks")
        if not isinstance(blocks, list) or len(blocks) != 2:
            raise BadMessage("blocks is not a pair")
        start, end = whole(blocks[0], 0, MAX_BLOCKS), whole(blocks[1], 1, MAX_BLOCKS)
        if start >= end:
            raise BadMessage("blocks is empty")
        sender = header.get("sender")
        return cls(
            session=session_id(header),
            fingerprint=text(header.get("fingerprint")),
            start=start,
            end=end,
            rows=whole(header.get("rows"), 1, MAX_ROWS),
            sender=None if sender is None else text(sender),
            adapter=text(header.get("adapter", "")),
        )


@dataclass(frozen=True)
class Step:
    """Hidden states of ``segments``, in order, in the frame's one tensor.

    ``took`` has the microseconds that each hop so far needed, its queue included. ``as_of``, in a
    replay, is the last step whose ``order`` its rows have gone through already.
    """

    seq: int
    segments: tuple[Segment, ...]
    type: str = "step"
    order: tuple[int, ...] = ()
    took: tuple[int, ...] = ()
    as_of: int = 0

    @property
    def tokens(self) -> int:
        return sum(segment.n for segment in self.segments)

    def passed(self, took_us: int) -> Step:
        """The step as it leaves a hop that needed so long. A sender may have filled the list."""
        return replace(self, took=(*self.took, min(took_us, MAX_TOOK_US))[-MAX_BLOCKS:])

    def to_wire(self) -> dict[str, Any]:
        wire: dict[str, Any] = {
            "type": self.type,
            "seq": self.seq,
            "segments": [segment.to_wire() for segment in self.segments],
            "took": list(self.took),
        }
        if self.order:
            wire["order"] = list(self.order)
        if self.as_of:
            wire["as_of"] = self.as_of
        return wire

    @classmethod
    def parse(cls, header: Mapping[str, Any], rows: int) -> Step:
        entries = header.get("segments")
        if not isinstance(entries, list) or not 1 <= len(entries) <= rows:
            raise BadMessage("segments is not a list of one entry a row")
        segments = tuple(parse_segment(entry, rows) for entry in entries)
        if len({segment.row for segment in segments}) != len(segments):
            raise BadMessage("a row comes twice")
        order = wholes(header.get("order", []), MAX_ROWS, rows - 1)
        if order and len(order) != rows:
            raise BadMessage("order does not name a row for each row")
        step = cls(
            whole(header.get("seq"), 0, MAX_SEQ),
            segments,
            order=order,
            took=wholes(header.get("took", []), MAX_BLOCKS, MAX_TOOK_US),
            as_of=whole(header.get("as_of", 0), 0, MAX_SEQ),
        )
        if step.tokens > MAX_STEP_TOKENS:
            raise BadMessage(f"{step.tokens} tokens in one step, over {MAX_STEP_TOKENS}")
        return step


@dataclass(frozen=True)
class Replay:
    """What a receiver lacks: of each row the positions [start, committed), then pending steps."""

    start: tuple[int, ...]
    committed: tuple[int, ...]
    pending: tuple[Step, ...] = ()

    def to_wire(self) -> list[Any]:
        return [list(self.start), list(self.committed), [step.to_wire() for step in self.pending]]

    @classmethod
    def parse(cls, entry: object, rows: int) -> Replay:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], list):
            raise BadMessage("replay is not start, committed, pending")
        start, committed = (wholes(part, MAX_ROWS, MAX_POSITION) for part in entry[:2])
        if len(start) != rows or len(committed) != rows or len(entry[2]) > MAX_PENDING:
            raise BadMessage("replay does not fit the session's rows")
        if not all(isinstance(header, dict) for header in entry[2]):
            raise BadMessage("a pending step is not one")
        return cls(start, committed, tuple(Step.parse(header, rows) for header in entry[2]))


@dataclass(frozen=True)
class Link:
    """Push this session's outputs to the ``session`` at ``peer``; without one, through the client.

    A ``spare`` link only brings the peer up to date; outputs go on where they went.
    """

    peer: str | None
    session: bytes
    addrs: tuple[str, ...]
    replay: Replay
    spare: bool = False

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": "link",
            "peer": self.peer,
            "session": self.session,
            "addrs": list(self.addrs),
            "replay": self.replay.to_wire(),
            "spare": self.spare,
        }

    @classmethod
    def parse(cls, header: Mapping[str, Any], rows: int) -> Link:
        addrs, peer = header.get("addrs"), header.get("peer")
        if not isinstance(addrs, list) or len(addrs) > MAX_ADDRS:
            raise BadMessage("addrs is not a short list")
        return cls(
            None if peer is None else text(peer),
            session_id(header),
            tuple(text(addr) for addr in addrs),
            Replay.parse(header.get("replay"), rows),
            header.get("spare") is True,
        )


def parse_segment(entry: object, rows: int) -> Segment:
    if not isinstance(entry, list) or len(entry) != 4:
        raise BadMessage("a segment is not row, position, n, want")
    n = whole(entry[2], 1, MAX_STEP_TOKENS)
    return Segment(
        row=whole(entry[0], 0, rows - 1),
        position=whole(entry[1], 0, MAX_POSITION),
        n=n,
        want=whole(entry[3], 0, n),
    )


def wholes(value: object, most: int, high: int) -> tuple[int, ...]:
    """At most ``most`` integers in ``[0, high]``, or BadMessage."""
    if not isinstance(value, list) or len(value) > most:
        raise BadMessage("a list of numbers is not one, or too long")
    return tuple(whole(number, 0, high) for number in value)


def feed_wire(session: bytes) -> dict[str, Any]:
    """The first frame on a feed stream."""
    return {"type": "feed", "session": session}


def refusal_wire(code: str, why: str) -> dict[str, Any]:
    """The answer to an ``open`` or ``feed`` that is not taken."""
    return {"type": "refused", "code": code, "why": why}


def error_wire(code: str, why: str, session: bytes = b"") -> dict[str, Any]:
    """Tell the client what went wrong; ``session`` names the link that it is about, if any."""
    return {"type": "error", "code": code, "why": why[:MAX_TEXT], "session": session}


def session_id(header: Mapping[str, Any]) -> bytes:
    value = header.get("session")
    if not isinstance(value, bytes) or len(value) != SESSION_ID_BYTES:
        raise BadMessage(f"session is not {SESSION_ID_BYTES} bytes")
    return value


def text(value: object) -> str:
    """A string of bounded length, or BadMessage."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise BadMessage("a text is missing or too long")
    return value


def whole(value: object, low: int, high: int) -> int:
    """An integer in ``[low, high]``, or BadMessage. Booleans are not integers here."""
    if type(value) is not int or not low <= value <= high:
        raise BadMessage(f"a number is not a whole number from {low} to {high}")
    return value
