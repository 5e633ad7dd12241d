"""yamux's frames on the wire, and how they are found in bytes that arrive in any pieces.

u8 version 0 | u8 type | u16 flags | u32 stream id | u32 length        all big-endian
type: 0 data, 1 window update, 2 ping, 3 go away     flags: 1 SYN, 2 ACK, 4 FIN, 8 RST
"""

from __future__ import annotations

import struct
from typing import Protocol

HEADER = struct.Struct(">BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class FrameSink(Protocol):
    """Who is told of frames until it raises, or ``is_over``."""

    @property
    def is_over(self) -> bool:
        """Nothing more is wanted."""

    def on_header(self, version: int, kind: int, flags: int, stream_id: int, value: int) -> None:
        """A header is complete."""

    def on_body(self, data: memoryview, *, is_last: bool) -> None:
        """More of the body of the data frame begun last; valid during the call."""


class FrameReader:
    """Cuts what arrives into frames. Keeps no more than a cut-off header."""

    def __init__(self, sink: FrameSink) -> None:
        self._sink = sink
        self._header = bytearray()
        self._body_left = 0

    def feed(self, data: memoryview) -> None:
        """Bytes have arrived: tell the sink of all frames in them."""
        at, end = 0, len(data)
        while at < end and not self._sink.is_over:
            if self._body_left:
                n = min(self._body_left, end - at)
                self._body_left -= n
                self._sink.on_body(data[at : at + n], is_last=not self._body_left)
                at += n
            elif self._header or end - at < HEADER.size:
                n = min(HEADER.size - len(self._header), end - at)
                self._header += data[at : at + n]
                at += n
                if len(self._header) == HEADER.size:
                    header, self._header = self._header, bytearray()
                    self._on_header(*HEADER.unpack(header))
            else:
                self._on_header(*HEADER.unpack_from(data, at))
                at += HEADER.size

    def _on_header(self, version: int, kind: int, flags: int, stream_id: int, value: int) -> None:
        self._body_left = value if kind == DATA else 0
        self._sink.on_header(version, kind, flags, stream_id, value)
