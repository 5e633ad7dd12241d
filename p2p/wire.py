"""TCP: a connection as two synchronous calls and two waits, and the ``Transport`` that makes them.

A trio stream costs a scheduler pass for every send and every receive. Here data moves in plain
non-blocking calls, and a task waits only when the kernel has nothing to give or no room to take:
the muxer above decides when to yield. ``TCP_NOTSENT_LOWAT`` keeps what the kernel holds back
short, so that the muxer's own queue, where small frames go first, is where bulk data waits.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import Protocol

import trio

UNSENT_LIMIT_BYTES = 16 * 1024
LISTEN_BACKLOG = 1024
# Fall back to Linux' number where Python does not name the option.
TCP_NOTSENT_LOWAT: int = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
WOULD_BLOCK = -1


class Wire(Protocol):
    """What a connection needs below it. A simulated network provides its own."""

    @property
    def remote(self) -> tuple[str, int] | None:
        """Host and port of the other end, where there is such a thing."""

    def try_receive(self, buffer: memoryview) -> int:
        """Bytes put into ``buffer``; 0 at the end; WOULD_BLOCK. Raises OSError."""

    def try_send(self, data: memoryview | bytes) -> int:
        """How many bytes were taken, possibly none. Raises OSError."""

    async def readable(self) -> None:
        """Wait until try_receive has something to say. Raises OSError once closed."""

    async def writable(self) -> None:
        """Wait until try_send may take more. Raises OSError once closed."""

    def close(self) -> None:
        """Close at once and wake whoever waits. Never raises."""


class Listening(Protocol):
    """A place where others connect. ``address`` is the bound host and port."""

    address: tuple[str, int]

    async def accept(self) -> Wire:
        """The next connection. Raises OSError when one failed, trio.ClosedResourceError."""

    def close(self) -> None:
        """Stop listening. Never raises."""


class Transport(Protocol):
    """How connections come about: ``TCP``, or what a simulated network provides."""

    async def dial(self, host: str, port: int) -> Wire:
        """Connect to a host (an IP address or a name) and port. Raises OSError; has no deadline."""

    def listen(self, host: str, port: int) -> Listening:
        """Listen from now on; port 0 takes a free one. Raises OSError."""


class SocketWire:
    """A ``Wire`` over a connected, non-blocking TCP socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._closed = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_LIMIT_BYTES)
        self.remote: tuple[str, int] | None = None
        with suppress(OSError):
            host, port = sock.getpeername()[:2]
            self.remote = (str(host), int(port))

    def try_receive(self, buffer: memoryview) -> int:
        """See ``Wire``."""
        try:
            return self._sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return WOULD_BLOCK

    def try_send(self, data: memoryview | bytes) -> int:
        """See ``Wire``."""
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    async def readable(self) -> None:
        """See ``Wire``."""
        if self._closed:
            raise OSError(errno.EBADF, "closed here")
        try:
            await trio.lowlevel.wait_readable(self._sock.fileno())
        except trio.ClosedResourceError:
            raise OSError(errno.EBADF, "closed here") from None

    async def writable(self) -> None:
        """See ``Wire``."""
        if self._closed:
            raise OSError(errno.EBADF, "closed here")
        try:
            await trio.lowlevel.wait_writable(self._sock.fileno())
        except trio.ClosedResourceError:
            raise OSError(errno.EBADF, "closed here") from None

    def close(self) -> None:
        """See ``Wire``."""
        if not self._closed:
            self._closed = True
            with suppress(OSError):
                trio.lowlevel.notify_closing(self._sock.fileno())
                self._sock.close()


async def dial_tcp(host: str, port: int) -> SocketWire:
    """Connect to a host (an IP address or a name) and port. Raises OSError; has no deadline."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    error: OSError | None = None
    for family, kind, proto, _, address in found:
        sock = trio.socket.socket(family, kind, proto)
        try:
            await sock.connect(address)
        except OSError as refused:
            sock.close()
            error = refused
        except BaseException:
            sock.close()
            raise
        else:
            return SocketWire(socket.socket(fileno=sock.detach()))
    raise error or OSError(errno.EADDRNOTAVAIL, f"{host} has no address")


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError.

    Without SO_REUSEPORT, which py-libp2p's own listener sets: with it two nodes of one user would
    share a port, and each would get some of the other's peers.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(LISTEN_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class TcpListening:
    """``Listening`` over a socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        host, port = sock.getsockname()[:2]
        self.address = (str(host), int(port))

    async def accept(self) -> SocketWire:
        """See ``Listening``."""
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock.fileno())
            except OSError:
                if self._sock.fileno() == -1:
                    raise trio.ClosedResourceError from None
                raise
            else:
                return _wired(sock)

    def close(self) -> None:
        """See ``Listening``."""
        if self._sock.fileno() != -1:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()


def _wired(sock: socket.socket) -> SocketWire:
    try:
        return SocketWire(sock)
    except OSError:  # the dialler has left already
        sock.close()
        raise


class TcpTransport:
    """The machine's own TCP."""

    async def dial(self, host: str, port: int) -> SocketWire:
        """See ``Transport``."""
        return await dial_tcp(host, port)

    def listen(self, host: str, port: int) -> TcpListening:
        """See ``Transport``."""
        return TcpListening(listen_tcp(host, port))


TCP = TcpTransport()
