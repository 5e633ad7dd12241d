"""The client's end of a chain: one control stream and one reader task a hop.

Hidden states go to the first hop on its control stream, from hop to hop on feed streams that the
hops open among themselves, and come back on the last hop's control stream. ``open_chain`` owns the
nursery; leaving it resets every stream, which frees the session's caches on every hop.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import trio

from petalnode.errors import PeerError, PeerGone, PeerMisbehaved, PeerRefused
from petalnode.nurseries import plain_errors
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import (
    HOP_PROTOCOL,
    MAX_STEP_TOKENS,
    MAX_TEXT,
    SESSION_ID_BYTES,
    BadMessage,
    Link,
    Open,
    Segment,
    Step,
)
from petalnode.routing.chain import Hop

OPEN_DEADLINE_S = 15.0
"""For every hop to accept the session and reach the next."""
OPEN_HOP_DEADLINE_S = 8.0
"""For one hop to accept it; it alone is to blame otherwise."""
STEP_DEADLINE_S = 120.0
"""For the chain to return one chunk, counted from the previous one."""


class Opener(Protocol):
    """The part of the host that a chain needs."""

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A new stream to ``peer_id``."""


@dataclass(eq=False)
class _Awaited:
    """One chunk on its way through the chain."""

    wanted: int
    arrived: trio.Event = field(default_factory=trio.Event)
    hidden: torch.Tensor | None = None


class Chain:
    """An open chain. One ``forward`` at a time. Made by ``open_chain``."""

    def __init__(self, hops: Sequence[Hop], rows: int, hidden_size: int) -> None:
        self.hops = tuple(hops)
        self.rows = rows
        self._hidden_size = hidden_size
        self._streams: list[FrameStream] = []
        self._awaited: dict[int, _Awaited] = {}
        self._linked = [trio.Event() for _ in self.hops]
        self._seq = 0
        self._failure: PeerError | None = None
        self._outbox, self._to_send = trio.open_memory_channel[tuple[Step, torch.Tensor]](0)

    async def forward(self, segments: Sequence[Segment], hidden: torch.Tensor) -> torch.Tensor:
        """Run ``hidden`` [T, H] of ``segments``, in order, through all hops.

        Returns [W, H], the outputs that the segments want, in order. Raises what the chain failed
        with: ``PeerGone``, ``PeerRefused`` or ``PeerMisbehaved``, naming the peer.
        """
        sent: list[int] = []
        try:
            offset = 0
            for chunk in chunks(segments, MAX_STEP_TOKENS):
                tokens = sum(segment.n for segment in chunk)
                sent.append(await self._send(chunk, hidden[offset : offset + tokens]))
                offset += tokens
            parts = [await self._await_output(seq) for seq in sent]
        finally:
            for seq in sent:
                self._awaited.pop(seq, None)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    async def _send(self, chunk: Sequence[Segment], hidden: torch.Tensor) -> int:
        self._raise_failure()
        self._seq += 1
        step = Step(self._seq, tuple(chunk))
        self._awaited[step.seq] = _Awaited(sum(segment.want for segment in chunk))
        await self._outbox.send((step, hidden))
        return step.seq

    async def _send_steps(self) -> None:
        """Send what ``forward`` hands over. In a task of its own: half a frame would break the
        stream, so a caller that is cancelled must not cut one off."""
        async for step, hidden in self._to_send:
            if self._failure is not None or step.seq not in self._awaited:
                continue
            with trio.move_on_after(STEP_DEADLINE_S) as scope:
                try:
                    await self._streams[0].send(step.to_wire(), [hidden])
                except PeerError as error:
                    self._fail(error)
            if scope.cancelled_caught:
                self._fail(silent(self.hops[0], STEP_DEADLINE_S))

    async def _await_output(self, seq: int) -> torch.Tensor:
        awaited = self._awaited[seq]
        with trio.move_on_after(STEP_DEADLINE_S):
            await awaited.arrived.wait()
        if awaited.hidden is None and self._failure is None:
            self._fail(silent(self.hops[-1], STEP_DEADLINE_S))
        self._raise_failure()
        assert awaited.hidden is not None
        return awaited.hidden

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: PeerError) -> None:
        """Remember the first failure and wake whoever waits."""
        if self._failure is None:
            self._failure = error
        for awaited in self._awaited.values():
            awaited.arrived.set()
        for linked in self._linked:
            linked.set()

    async def _read(self, index: int) -> None:
        """One hop's control stream, to its end. Failures are kept, never raised."""
        hop, stream = self.hops[index], self._streams[index]
        try:
            while (frame := await stream.receive()) is not None:
                self._take(index, frame)
            self._fail(PeerGone(f"Peer {hop.peer_id} closed the session.", peer_id=hop.peer_id))
        except PeerError as error:
            self._fail(error)
        except BadMessage as bad:
            self._fail(misbehaved(hop.peer_id, str(bad)))

    def _take(self, index: int, frame: Frame) -> None:
        kind = frame.header.get("type")
        if kind == "out":
            if index == len(self.hops) - 1:
                self._take_output(Step.parse(frame.header, self.rows), frame)
        elif kind == "linked":
            self._linked[index].set()
        elif kind == "error":
            following = self.hops[index + 1].peer_id if index + 1 < len(self.hops) else None
            self._fail(reported(self.hops[index].peer_id, following, frame.header))
        else:
            raise BadMessage("a message of unknown type")

    def _take_output(self, step: Step, frame: Frame) -> None:
        awaited = self._awaited.get(step.seq)
        if awaited is None:
            return  # of a step that was given up
        shape = (awaited.wanted, self._hidden_size)
        if len(frame.tensors) != 1 or tuple(frame.tensors[0].shape) != shape:
            raise BadMessage(f"an output is not of shape {shape}")
        awaited.hidden = frame.tensors[0]
        awaited.arrived.set()

    async def _open(
        self, opener: Opener, fingerprint: str, addrs: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Open all hops at once, then link each to its next, all at once."""
        session = secrets.token_bytes(SESSION_ID_BYTES)
        streams: dict[int, FrameStream] = {}

        async def open_hop(index: int) -> None:
            hop = self.hops[index]
            sender = self.hops[index - 1].peer_id if index else None
            opened = Open(session, fingerprint, hop.start, hop.end, self.rows, sender)
            try:
                with trio.fail_after(OPEN_HOP_DEADLINE_S):
                    streams[index] = await opener.open_stream(hop.peer_id, HOP_PROTOCOL)
                    await streams[index].send(opened.to_wire())
                    check_opened(hop.peer_id, await streams[index].receive())
            except trio.TooSlowError:
                raise PeerGone(
                    f"Peer {hop.peer_id} did not open a session in {OPEN_HOP_DEADLINE_S:.0f} s.",
                    "Try again; `petalnode status` shows who answers.",
                    hop.peer_id,
                ) from None

        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    for index in range(len(self.hops)):
                        nursery.start_soon(open_hop, index)
        finally:
            self._streams = [streams[index] for index in sorted(streams)]
        for hop, stream in zip(self.hops[1:], self._streams, strict=False):
            await stream.send(Link(hop.peer_id, addrs.get(hop.peer_id, ())).to_wire())

    async def _wait_linked(self) -> None:
        for linked in self._linked[:-1]:
            await linked.wait()
        self._raise_failure()

    def _reset(self) -> None:
        for stream in self._streams:
            stream.reset()


@asynccontextmanager
async def open_chain(
    opener: Opener,
    hops: Sequence[Hop],
    *,
    fingerprint: str,
    hidden_size: int,
    rows: int = 1,
    addrs: Mapping[str, tuple[str, ...]] | None = None,
) -> AsyncIterator[Chain]:
    """Open a session on every hop of a chain, link them, and close it all on leaving.

    Raises ``PeerUnreachable``, ``PeerRefused``, ``PeerGone`` or ``PeerMisbehaved``, naming the
    first hop that failed. ``addrs`` are the hops' addresses, for the hops that dial each other.
    """
    chain = Chain(hops, rows, hidden_size)
    try:
        with plain_errors():
            async with trio.open_nursery() as nursery:
                with trio.move_on_after(OPEN_DEADLINE_S) as deadline:
                    await chain._open(opener, fingerprint, addrs or {})
                    for index in range(len(chain.hops)):
                        nursery.start_soon(chain._read, index)
                    nursery.start_soon(chain._send_steps)
                    await chain._wait_linked()
                if deadline.cancelled_caught:
                    raise PeerGone(
                        f"The chain {describe(hops)} did not open in {OPEN_DEADLINE_S:.0f} s.",
                        "Try again; `petalnode status` shows who answers.",
                    )
                yield chain
                nursery.cancel_scope.cancel()
    finally:
        chain._reset()


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


def check_opened(peer_id: str, frame: Frame | None) -> None:
    """Raise unless the hop said ``opened``."""
    if frame is None:
        raise PeerGone(f"Peer {peer_id} closed the session at once.", peer_id=peer_id)
    kind = frame.header.get("type")
    if kind == "refused":
        why, code = words(frame.header, "why"), words(frame.header, "code")
        raise PeerRefused(f"Peer {peer_id} refused the session: {why}.", "", peer_id, code)
    if kind != "opened":
        raise misbehaved(peer_id, "it answered neither opened nor refused")


def reported(peer_id: str, following: str | None, header: Mapping[str, Any]) -> PeerError:
    """What a hop's error message means: who is to blame is not always who reports."""
    code, why, blamed = words(header, "code"), words(header, "why"), words(header, "peer")
    if code in ("next", "link"):
        if blamed != following:
            return misbehaved(peer_id, "it blames a peer that is not its next hop")
        return PeerGone(f"Peer {peer_id} lost its next hop {blamed}: {why}", peer_id=blamed)
    return PeerRefused(f"Peer {peer_id} cannot go on ({code}): {why}.", "", peer_id, code)


def words(header: Mapping[str, Any], key: str) -> str:
    """Printable, bounded text that a peer sent."""
    value = header.get(key, "")
    if not isinstance(value, str):
        return "(no text)"
    return "".join(char if char.isprintable() else "?" for char in value[:MAX_TEXT])


def misbehaved(peer_id: str, what: str) -> PeerMisbehaved:
    return PeerMisbehaved(f"Peer {peer_id} broke the hop protocol: {what}.", peer_id=peer_id)


def silent(hop: Hop, seconds: float) -> PeerGone:
    return PeerGone(
        f"Nothing came back from the chain within {seconds:.0f} s; its last hop is {hop.peer_id}.",
        "Try again; `petalnode status` shows who answers.",
        hop.peer_id,
    )


def describe(hops: Sequence[Hop]) -> str:
    """``[0:4] 12D3…abcd → [4:8] 12D3…efgh``."""
    return " → ".join(f"[{hop.start}:{hop.end}] …{hop.peer_id[-8:]}" for hop in hops)
