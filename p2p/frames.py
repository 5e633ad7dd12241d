"""Frames: one msgpack header and raw tensor bytes, over any ordered byte stream.

    u32 header length | u32 payload length | header (msgpack map) | payload (tensor bytes)

Lengths are big-endian and are checked against named limits before anything is allocated. Tensors
are described in the header under ``"_t"`` as ``[dtype, shape]`` and lie in the payload one after
the other, each start aligned to 16 bytes, so that neither side copies them through msgpack: the
sender hands out memoryviews of the tensors, the receiver wraps the received buffer. Tensor bytes
are little-endian, which every platform that torch runs on is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgpack

from petalnode.errors import LocalProtocolError, PeerMisbehaved

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 256 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_TENSORS = 16
MAX_DIMS = 4
ALIGN = 16
PREFIX = struct.Struct(">II")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}

Buffer = bytes | bytearray | memoryview


class ByteStream(Protocol):
    """What a frame stream needs below it: one authenticated, ordered, two-way byte stream."""

    peer_id: str

    async def read_start(self, n: int) -> Buffer | None:
        """The next ``n`` bytes, or None if the peer ended cleanly before the first of them."""

    async def read_exactly(self, n: int) -> Buffer:
        """The next ``n`` bytes. Raises PeerGone when the stream ends or is reset before."""

    async def write(self, *buffers: Buffer) -> None:
        """Send one message. If cancelled half-way this stream is reset, no other."""

    async def close_write(self) -> None:
        """Say that no more will come."""

    async def wait_broken(self) -> None:
        """Until the stream is reset by either side, or its connection ends."""

    def reset(self) -> None:
        """Drop the stream at once, both ways. Never raises."""


@dataclass(frozen=True)
class Frame:
    """One received message."""

    header: dict[str, Any]
    tensors: list[torch.Tensor] = field(default_factory=list)


class FrameStream:
    """Frames over one byte stream. One task receives; any task may send, a frame is one write.

    ``max_payload`` bytes is the limit both ways; a protocol that needs less sets it lower.

    Raises ``PeerGone`` when the stream breaks, ``PeerMisbehaved`` on a frame that breaks the
    format (the stream is reset first).
    """

    def __init__(self, raw: ByteStream, *, max_payload: int = MAX_PAYLOAD_BYTES) -> None:
        self._raw = raw
        self.max_payload = max_payload
        self.peer_id = raw.peer_id

    async def send(self, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Send one frame. Tensors are sent from where they lie; do not change them meanwhile."""
        await self._raw.write(*encode(header, tensors, self.max_payload))

    async def receive(self) -> Frame | None:
        """The next frame, or None after a clean end between frames."""
        prefix = await self._raw.read_start(PREFIX.size)
        if prefix is None:
            return None
        header_len, payload_len = PREFIX.unpack(prefix)
        try:
            check_lengths(header_len, payload_len, self.max_payload)
            header = decode_header(await self._raw.read_exactly(header_len))
            specs = tensor_specs(header.pop("_t", []), payload_len)
            if not specs:
                return Frame(header)
            return Frame(header, wrap_tensors(specs, await self._raw.read_exactly(payload_len)))
        except BadFrame as bad:
            self._raw.reset()
            raise PeerMisbehaved(
                f"Peer {self.peer_id} sent a frame that breaks the format: {bad}.",
                "Its stream was closed; if it persists, that peer runs other software.",
                self.peer_id,
            ) from None

    async def aclose(self) -> None:
        """End our direction cleanly."""
        await self._raw.close_write()

    async def wait_broken(self) -> None:
        """Until the stream is reset by either side. Tells it at once, whatever waits unread."""
        await self._raw.wait_broken()

    def reset(self) -> None:
        """Drop the stream at once. Never raises."""
        self._raw.reset()


class BadFrame(ValueError):
    """What is wrong with a frame, in words."""


def encode(
    header: dict[str, Any], tensors: Sequence[torch.Tensor], max_payload: int = MAX_PAYLOAD_BYTES
) -> list[Buffer]:
    """The buffers of one frame: prefix and header joined, then each tensor's own memory."""
    payload: list[Buffer] = []
    size = 0
    if tensors:
        specs = []
        for tensor in tensors:
            view = tensor_bytes(tensor)
            pad = -size % ALIGN
            if pad:
                payload.append(bytes(pad))
            payload.append(view)
            size += pad + len(view)
            specs.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        header = {**header, "_t": specs}
    packed: bytes = msgpack.packb(header)
    if len(packed) > MAX_HEADER_BYTES or size > max_payload:
        raise LocalProtocolError(
            f"A frame of {len(packed)} header and {size} payload bytes is over our own limit."
        )
    return [PREFIX.pack(len(packed), size) + packed, *payload]


def check_lengths(header_len: int, payload_len: int, max_payload: int) -> None:
    if header_len > MAX_HEADER_BYTES:
        raise BadFrame(f"a header of {header_len} bytes, over the limit of {MAX_HEADER_BYTES}")
    if payload_len > max_payload:
        raise BadFrame(f"a payload of {payload_len} bytes, over the limit of {max_payload}")


def decode_header(raw: Buffer) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(raw)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadFrame(f"the header is not msgpack ({type(error).__name__})") from None
    if not isinstance(header, dict) or not all(isinstance(key, str) for key in header):
        raise BadFrame("the header is not a map of names")
    return header


def tensor_specs(described: object, payload_len: int) -> list[tuple[str, list[int], int, int]]:
    """Checked ``(dtype, shape, offset, bytes)`` of each tensor; they must fill the payload."""
    if not isinstance(described, list) or len(described) > MAX_TENSORS:
        raise BadFrame("its tensors are not described as a short list")
    specs = []
    end = 0
    for entry in described:
        if not isinstance(entry, list) or len(entry) != 2:
            raise BadFrame("a tensor is not described as dtype and shape")
        dtype, shape = entry
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise BadFrame("a tensor has a dtype that is not sent here")
        if not _is_shape(shape):
            raise BadFrame("a tensor has an impossible shape")
        start = end + (-end % ALIGN)
        size = math.prod(shape) * ITEM_BYTES[dtype]
        end = start + size
        specs.append((dtype, shape, start, size))
    if end != payload_len:
        raise BadFrame(f"its tensors need {end} bytes but it carries {payload_len}")
    return specs


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        return False
    return all(type(n) is int and 0 <= n <= MAX_PAYLOAD_BYTES for n in shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor as bytes, without a copy when it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).cpu().numpy().data


def wrap_tensors(specs: list[tuple[str, list[int], int, int]], raw: Buffer) -> list[torch.Tensor]:
    """Tensors over the received buffer (which must not be reused by its reader)."""
    import torch

    memory = memoryview(raw)
    if memory.readonly:
        memory = memoryview(bytearray(memory))
    tensors = []
    for dtype, shape, offset, size in specs:
        kind: torch.dtype = getattr(torch, dtype)
        if size == 0:
            tensors.append(torch.empty(shape, dtype=kind))
            continue
        count = size // ITEM_BYTES[dtype]
        tensor = torch.frombuffer(memory, dtype=kind, count=count, offset=offset)
        tensors.append(tensor.view(shape))
    return tensors
