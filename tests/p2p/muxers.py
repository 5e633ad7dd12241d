"""Two muxers over a wire in memory, for tests: alice dialled bob."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from petalnode.errors import PeerError
from petalnode.p2p.memory_wire import CAPACITY_BYTES, MemoryWire, memory_wire_pair
from petalnode.p2p.noise import NoiseSession, Scratch
from petalnode.p2p.yamux import Muxer
from petalnode.p2p.yamux_frames import HEADER
from petalnode.p2p.yamux_stream import Stream

DEADLINE_S = 60.0
"""Of a test that waits for something real: it only bounds what hangs, as a machine may be busy."""
STILL_S = 0.02
"""In which nothing happens, so that nothing is under way between two sockets of this machine."""
KEYS = (bytes(range(32)), bytes(range(32, 64)))


@dataclass
class End:
    wire: MemoryWire
    muxer: Muxer
    opened_by_peer: list[Stream]
    ended: list[PeerError] = field(default_factory=list)

    async def run(self) -> None:
        self.ended.append(await self.muxer.run())


def session_pair(capacity: int = CAPACITY_BYTES) -> tuple[NoiseSession, NoiseSession]:
    """Two secured ends with fixed keys: what a handshake would have left behind."""
    wires = memory_wire_pair(capacity)
    one, two = KEYS
    alice = NoiseSession(
        wires[0], "bob", send_key=one, receive_key=two, scratch=Scratch(), is_initiator=True
    )
    bob = NoiseSession(
        wires[1], "alice", send_key=two, receive_key=one, scratch=Scratch(), is_initiator=False
    )
    return alice, bob


@asynccontextmanager
async def open_muxers(capacity: int = CAPACITY_BYTES) -> AsyncIterator[tuple[End, End]]:
    ends = []
    for session in session_pair(capacity):
        opened: list[Stream] = []
        wire = session.wire
        assert isinstance(wire, MemoryWire)
        ends.append(End(wire, Muxer(session, opened.append), opened))
    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(end.run)
        yield ends[0], ends[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_against_script() -> AsyncIterator[tuple[NoiseSession, End]]:
    """Alice is a script that seals what it likes; bob is a real muxer."""
    script, session = session_pair()
    opened: list[Stream] = []
    wire = session.wire
    assert isinstance(wire, MemoryWire)
    bob = End(wire, Muxer(session, opened.append), opened)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bob.run)
        yield script, bob
        nursery.cancel_scope.cancel()


async def cancelled(wait: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    """Cancel what does not come to an end, once everything waits."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, *arguments)
        await trio.testing.wait_all_tasks_blocked(STILL_S)
        nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught


async def stream_pair(alice: End, bob: End) -> tuple[Stream, Stream]:
    stream = alice.muxer.open_stream()
    before = len(bob.opened_by_peer)
    while len(bob.opened_by_peer) == before:
        await trio.testing.wait_all_tasks_blocked()
    return stream, bob.opened_by_peer[-1]


def frame(kind: int, flags: int, stream_id: int, value: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, value) + body
