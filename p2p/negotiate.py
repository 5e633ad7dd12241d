"""multistream-select: how two libp2p peers agree on what to speak.

Each message is ``varint length | text | newline``. Both sides say hello; then the initiator
proposes and the other repeats what it accepts or says ``na``. The initiator here sends hello and
proposal together and the responder does not wait to greet, so that agreeing costs one round trip.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from petalnode.errors import PeerMisbehaved, PeerRefused

HELLO = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
MAX_MESSAGE_BYTES = 1024
MAX_PROPOSALS = 64

Buffer = bytes | bytearray | memoryview


class Pipe(Protocol):
    """Both a connection that is being set up and a stream."""

    peer_id: str

    async def read_exactly(self, n: int) -> Buffer:
        """The next ``n`` bytes."""

    async def write(self, *buffers: Buffer) -> None:
        """Send the bytes."""


def pack(text: str) -> bytes:
    """One message. Its length must fit two varint bytes, as every protocol id does."""
    body = text.encode() + b"\n"
    size = len(body)
    return (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + body


async def read_message(pipe: Pipe) -> str:
    """The text of the next message."""
    size = (await pipe.read_exactly(1))[0]
    if size > 127:
        size = size & 127 | (await pipe.read_exactly(1))[0] << 7
    if not 0 < size <= MAX_MESSAGE_BYTES:
        raise _misbehaved(pipe, f"a negotiation message of {size} bytes")
    body = bytes(await pipe.read_exactly(size))
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise _misbehaved(pipe, "negotiation that is not text") from None
    if not text.endswith("\n"):
        raise _misbehaved(pipe, "a negotiation message that does not end")
    return text[:-1]


async def propose(pipe: Pipe, protocol: str) -> None:
    """Agree on ``protocol`` as the initiator. Raises PeerRefused (code "protocol")."""
    await pipe.write(pack(HELLO) + pack(protocol))
    await _expect_hello(pipe)
    answer = await read_message(pipe)
    if answer == NOT_AVAILABLE:
        raise PeerRefused(
            f"Peer {pipe.peer_id or '(unknown)'} does not speak {protocol}.",
            "It may run another version or other software.",
            pipe.peer_id,
            "protocol",
        )
    if answer != protocol:
        raise _misbehaved(pipe, "an answer that was not asked for")


async def answer(pipe: Pipe, offered: Collection[str]) -> str:
    """Agree on one of ``offered`` as the responder and return it."""
    await pipe.write(pack(HELLO))
    await _expect_hello(pipe)
    for _ in range(MAX_PROPOSALS):
        proposed = await read_message(pipe)
        if proposed in offered:
            await pipe.write(pack(proposed))
            return proposed
        await pipe.write(pack(NOT_AVAILABLE))
    raise _misbehaved(pipe, "proposals without end")


async def _expect_hello(pipe: Pipe) -> None:
    if await read_message(pipe) != HELLO:
        raise _misbehaved(pipe, "another greeting than multistream-select's")


def _misbehaved(pipe: Pipe, what: str) -> PeerMisbehaved:
    return PeerMisbehaved(f"Peer {pipe.peer_id or '(unknown)'} sent {what}.", peer_id=pipe.peer_id)
