"""What a person hands to another to let a machine join: an invite, or a bare multiaddr.

    pn1: base64url( msgpack [network, model, fingerprint, [addr, ...]] | 4 bytes of SHA-256 )

The checksum finds typing and copying errors; it proves nothing about who made the invite. White
space inside is ignored, for terminals that wrap. libp2p is not imported, so that a bad invite is
answered at once.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgpack

from petalnode.errors import InviteError
from petalnode.p2p.identity import is_peer_id

SCHEME = "pn1:"
MAX_INVITE_CHARS = 4096
MAX_ADDRS = 8
MAX_ADDR_CHARS = 192
MAX_FIELD_CHARS = 256  # network id and model name
CHECKSUM_BYTES = 4
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_COPY_AGAIN = "Copy the whole invite again from the node that printed it."
_EXPECTED = (
    "Use the invite that `petalnode run` prints (pn1:...), or an address such as "
    "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..."
)


@dataclass(frozen=True)
class Invite:
    """A swarm (network id, model name, model fingerprint) and where to find it: multiaddrs, each
    ending in ``/p2p/<peer id>``. Raises InviteError."""

    network: str
    model: str
    fingerprint: str
    addrs: tuple[str, ...]

    def __post_init__(self) -> None:
        for text in (self.network, self.model):
            if not isinstance(text, str) or not text.isprintable() or len(text) > MAX_FIELD_CHARS:
                raise InviteError("The invite names no proper network or model.", _COPY_AGAIN)
        if not isinstance(self.fingerprint, str) or not _FINGERPRINT.fullmatch(self.fingerprint):
            raise InviteError("The invite holds no model fingerprint.", _COPY_AGAIN)
        if not isinstance(self.addrs, tuple) or not 0 < len(self.addrs) <= MAX_ADDRS:
            raise InviteError(f"The invite does not hold 1 to {MAX_ADDRS} addresses.", _COPY_AGAIN)
        for addr in self.addrs:
            check_addr(addr)

    def encode(self) -> str:
        body: bytes = msgpack.packb([self.network, self.model, self.fingerprint, [*self.addrs]])
        return SCHEME + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "Invite":
        """The invite in ``text``. Raises InviteError, one sentence for what is wrong."""
        if len(text) > MAX_INVITE_CHARS:
            raise InviteError(f"The invite is longer than {MAX_INVITE_CHARS} letters.", _COPY_AGAIN)
        text = "".join(text.split())
        if re.match(r"pn\d+:", text) and not text.startswith(SCHEME):
            raise InviteError(
                "The invite was made by another version of petalnode.", "Update petalnode."
            )
        if not text.startswith(SCHEME):
            raise InviteError(f"The invite does not start with {SCHEME}", _EXPECTED)
        network, model, fingerprint, addrs = _fields(text.removeprefix(SCHEME))
        return cls(network, model, fingerprint, tuple(addrs))


def parse_join(text: str) -> Invite | str:
    """What ``--join`` was given: an Invite, or a multiaddr ending in /p2p/<peer id> as text.

    Raises InviteError.
    """
    text = text.strip()
    if text.startswith("/"):
        return check_addr(text)
    if text.startswith("pn"):
        return Invite.parse(text)
    shown = text if len(text) <= 40 else text[:40] + "..."
    raise InviteError(f"{shown!r} is neither an invite nor an address.", _EXPECTED)


def check_addr(addr: str) -> str:
    """``addr`` itself, if it is a multiaddr that ends in the id of a peer. Raises InviteError."""
    if not isinstance(addr, str) or len(addr) > MAX_ADDR_CHARS:
        raise InviteError(f"An address is longer than {MAX_ADDR_CHARS} letters.", _EXPECTED)
    if not (addr.isascii() and addr.isprintable()):
        raise InviteError("An address holds letters that no address has.", _EXPECTED)
    transport, found, peer_id = addr.rpartition("/p2p/")
    if not found or not transport:
        raise InviteError(f"The address {addr} does not end in /p2p/<peer id>.", _EXPECTED)
    if not is_peer_id(peer_id):
        raise InviteError(f"{peer_id!r} is not the id of a peer.", _EXPECTED)
    _check_transport(transport, addr)
    return addr


def _check_transport(transport: str, addr: str) -> None:
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error

    try:
        Multiaddr(transport)
    except (Error, ValueError) as error:
        raise InviteError(f"{addr} is not a multiaddr: {error}.", _EXPECTED) from None


def _fields(encoded: str) -> list[Any]:
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InviteError("The invite holds letters that no invite has.", _COPY_AGAIN) from None
    body, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
    if checksum != _checksum(body):
        raise InviteError("The invite is damaged or incomplete.", _COPY_AGAIN)
    try:
        fields = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.UnpackException):
        fields = None
    if not isinstance(fields, list) or len(fields) != 4 or not isinstance(fields[3], list):
        raise InviteError("The invite does not hold what an invite holds.", _COPY_AGAIN)
    return fields


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(SCHEME.encode() + body).digest()[:CHECKSUM_BYTES]
