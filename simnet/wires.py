"""One end of a simulated TCP connection: a ``Wire``, as the real one over a socket is.

What is kept of TCP: bytes arrive in order; a loss or a partition delays them, and all behind them,
until a retransmission comes through; the sender may have ``WINDOW_BYTES`` under way that the other
end has not read and acknowledged; closing is heard behind the last byte; a reset is not.
Congestion control is not modelled: a connection uses its link from the first byte on.
"""

from __future__ import annotations

import errno
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from petalnode.p2p.wire import UNSENT_LIMIT_BYTES, WOULD_BLOCK
from petalnode.simnet.links import Link

WINDOW_BYTES = 4 * 1024 * 1024
BURST_BYTES = 16 * 1024
CLOCK_NOISE_S = 1e-9  # less cannot be slept


@dataclass(frozen=True)
class Segment:
    """What waits to cross the link: ``arrive`` is called at the other end."""

    kind: str
    size: int
    arrive: Callable[[], None]


class Carrier(Protocol):
    """What a wire needs of its network."""

    def carry(self, wire: SimWire, segment: Segment) -> None:
        """Take a segment to the other end, in order, as often as it takes."""

    def send_reset(self, wire: SimWire) -> None:
        """Tell the other end that this connection is no more."""

    def is_up(self, name: str) -> bool:
        """Whether the host runs."""


@dataclass(eq=False)
class SimWire:
    """See the module. ``link`` leads to the other end; ``cut`` says that the host died."""

    carrier: Carrier
    link: Link
    remote: tuple[str, int] | None
    other: SimWire = field(init=False, repr=False)
    arrived: bytearray = field(default_factory=bytearray)
    waiting: deque[Segment] = field(default_factory=deque)
    last_arrival: float = 0.0
    closed: bool = False
    cut: bool = False
    ended: bool = False
    is_reset: bool = False
    sent: int = 0
    acknowledged: int = 0
    read: int = 0
    _readers: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    _writers: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    # What the muxer calls

    def try_receive(self, buffer: memoryview) -> int:
        """See ``Wire``."""
        self._check()
        if self.cut or not (self.arrived or self.ended):
            return WOULD_BLOCK
        taken = self.arrived[: len(buffer)]
        buffer[: len(taken)] = taken
        del self.arrived[: len(taken)]
        self.read += len(taken)
        if self.link.is_up:
            self.acknowledge()
        return len(taken)

    def try_send(self, data: memoryview | bytes) -> int:
        """See ``Wire``. As with a socket, what is taken may exceed the limit on unsent bytes."""
        self._check()
        if self.cut:
            return len(data)
        if self._room_in() > 0:
            return 0
        taken = bytes(data[: WINDOW_BYTES - (self.sent - self.acknowledged)])
        self.sent += len(taken)
        # On a slow link the first bytes arrive before the last ones leave.
        step = len(taken) if self.link.bandwidth == math.inf else BURST_BYTES
        for start in range(0, len(taken), step or 1):
            part = taken[start : start + step]
            arrive = partial(self.other.deliver, part)
            self.carrier.carry(self, Segment("send", len(part), arrive))
        return len(taken)

    async def readable(self) -> None:
        """See ``Wire``."""
        await trio.lowlevel.checkpoint()
        while self.cut or not (self.arrived or self.ended):
            self._check()
            await self._readers.park()
        self._check()

    async def writable(self) -> None:
        """See ``Wire``."""
        await trio.lowlevel.checkpoint()
        while self.cut or self._room_in() > 0:
            self._check()
            with trio.move_on_after(math.inf if self.cut else self._room_in()):
                await self._writers.park()
        self._check()

    def close(self) -> None:
        """See ``Wire``."""
        if self.closed:
            return
        self.closed = True
        if not self.cut and not self.is_reset:
            self.carrier.carry(self, Segment("end", 0, self.other.hear_end))
        self.wake()

    # What the network calls

    def deliver(self, data: bytes) -> None:
        """Bytes have come. A connection that is no more answers with a reset."""
        if self.cut:
            if self.carrier.is_up(self.link.source):
                self.carrier.send_reset(self)
        elif self.closed:
            self.carrier.send_reset(self)
        else:
            self.arrived += data
            self._readers.unpark_all()

    def hear_end(self) -> None:
        """The other end has closed."""
        self.ended = True
        self.wake()

    def hear_reset(self) -> None:
        """The other end knows nothing of this connection."""
        self.is_reset = True
        self.waiting.clear()
        self.wake()

    def cut_off(self) -> None:
        """The host died: nothing goes out or comes in any more."""
        self.cut = True
        self.waiting.clear()

    def acknowledge(self) -> None:
        """The other end learns what was read here."""
        self.other.acknowledged = self.read
        self.other._writers.unpark_all()

    def wake(self) -> None:
        """Let waiters look again."""
        self._readers.unpark_all()
        self._writers.unpark_all()

    def _room_in(self) -> float:
        """Seconds until more can be sent; infinite while the window is full."""
        if self.sent - self.acknowledged >= WINDOW_BYTES:
            return math.inf
        limit_s = UNSENT_LIMIT_BYTES / self.link.bandwidth
        wait_s = self.link.backlog_s(trio.current_time()) - limit_s
        return wait_s if wait_s > CLOCK_NOISE_S else 0.0

    def _check(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "closed here")
        if self.is_reset:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
