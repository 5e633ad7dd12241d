"""The one seam where libp2p's, trio's and the operating system's errors become petalnode's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import InvalidSignature, PeerIDMismatchesPubkey
from multiaddr import Multiaddr

from petalnode.errors import ListenError, PeerUnreachable, PetalnodeError, UsageError

ADDRESS_REMEDY = "An address looks like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo…."
HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")


def parse_addr(text: str) -> tuple[Multiaddr, ID | None]:
    """A multiaddr and the peer id at its end, if it names one. Raises UsageError."""
    try:
        addr = Multiaddr(text)
        dial_target(addr)
        names = [protocol.name for protocol in addr.protocols()]
        peer_id = ID.from_string(addr.value_for_protocol("p2p")) if "p2p" in names else None
    except Exception:  # noqa: BLE001 - whatever the parsers raise, the text is at fault
        raise UsageError(f"{text!r} is not an address to dial.", ADDRESS_REMEDY) from None
    return addr, peer_id


def dial_target(addr: Multiaddr) -> tuple[str, int]:
    """Host and port of a TCP multiaddr. Raises UsageError."""
    names = [protocol.name for protocol in addr.protocols()]
    if names[1:2] != ["tcp"] or names[0] not in HOST_PROTOCOLS or set(names[2:]) - {"p2p"}:
        raise UsageError(f"{addr} is not a plain TCP address.", ADDRESS_REMEDY)
    host = addr.value_for_protocol(names[0])
    port = addr.value_for_protocol("tcp")
    return str(host), int(str(port))


def in_words(error: BaseException) -> str:
    """What went wrong, in a few words without a full stop."""
    if isinstance(error, BaseExceptionGroup) and error.exceptions:
        return in_words(error.exceptions[0])
    if isinstance(error, trio.TooSlowError):
        return "no answer in time"
    if isinstance(error, PeerIDMismatchesPubkey):
        return "another peer answers there"
    if isinstance(error, InvalidSignature):
        return "it could not prove its identity"
    if isinstance(error, PetalnodeError):
        return error.cause.rstrip(".")
    if isinstance(error, OSError):
        named = {errno.ECONNREFUSED: "connection refused", errno.EADDRINUSE: "already in use"}
        return named.get(error.errno or 0) or (error.strerror or str(error)).lower()
    if isinstance(error, BaseLibp2pError):
        return f"the handshake failed ({type(error).__name__})"
    return f"{type(error).__name__}: {error}"


def unreachable(peer_id: str, tried: dict[str, BaseException]) -> PeerUnreachable:
    """No address of a peer answered. ``tried`` says why, by address; it may be empty."""
    if not tried:
        return PeerUnreachable(
            f"No address of peer {peer_id} is known.", "Give one of its addresses.", peer_id
        )
    reasons = "; ".join(f"{addr}: {in_words(error)}" for addr, error in tried.items())
    remedy = "Check that it runs and that its port is open."
    if any(isinstance(error, PeerIDMismatchesPubkey) for error in tried.values()):
        remedy = "The address is out of date: ask that node for its present one."
    who = f"Peer {peer_id}" if peer_id else "That peer"
    return PeerUnreachable(f"{who} cannot be reached at {reasons}.", remedy, peer_id)


def cannot_listen(addr: str, port: int, error: OSError) -> ListenError:
    """Binding failed."""
    if error.errno == errno.EADDRINUSE:
        return ListenError(
            f"Port {port} ({addr}) is already in use.",
            "Choose another with --port, or port 0 for any free one.",
        )
    return ListenError(
        f"Cannot listen on {addr}: {in_words(error)}.",
        "Choose an address of this machine and a port that you may use.",
    )


@contextmanager
def collapsed() -> Iterator[None]:
    """Let the single exception inside nested groups out by itself, so that callers can name it."""
    try:
        yield
    except BaseExceptionGroup as group:
        inner: BaseException = group
        while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
            inner = inner.exceptions[0]
        if inner is group or isinstance(inner, BaseExceptionGroup):
            raise
        raise inner from None
