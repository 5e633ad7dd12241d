"""A signed announcement or suspicion as bytes: what gossip carries, snapshots repeat, views keep.

    64 bytes Ed25519 signature | msgpack map of the record

Every node of a swarm gets every record, so the map is kept small: its keys are numbers
(``compact.KEYS``), ids and fingerprints are bytes, addresses lack the peer id that they end in.
Keys that are names, with values in full, are read as well.

The signature covers a domain tag and the map, and is checked against the key in the id of the peer
who speaks (``peer_id`` of an announcement, ``accuser`` of a suspicion): an envelope needs no other
proof, whoever passed it on. Each kind has its own domain, so none passes for the other.
"""

import msgpack

from petalnode.p2p.compact import expand, shorten
from petalnode.p2p.identity import SIGNATURE_BYTES, Identity, verify
from petalnode.routing.announcement import Announcement, InvalidAnnouncement
from petalnode.routing.suspicion import Suspicion

MAX_RECORD_BYTES = 4096
_DOMAIN = b"petalnode announcement 1\0"  # no signature made for another purpose fits
_SUSPICION_DOMAIN = b"petalnode suspicion 1\0"
_MAX_ITEMS = 64  # in any one list or map of a record
_MAX_TEXT_BYTES = 256


def seal(identity: Identity, said: Announcement | Suspicion) -> bytes:
    """The envelope of what we say ourselves. Raises InvalidAnnouncement ("size", "signer")."""
    if _speaker(said) != identity.peer_id:
        raise InvalidAnnouncement("signer", "it is about another peer than the one who signs")
    body: bytes = msgpack.packb(shorten(said.to_dict()))
    envelope = identity.sign(_domain(said) + body) + body
    if len(envelope) > MAX_RECORD_BYTES:
        raise InvalidAnnouncement("size", f"it has {len(envelope)} bytes of {MAX_RECORD_BYTES}")
    return envelope


def unseal(envelope: bytes) -> Announcement:
    """The checked record in ``envelope``, which may be anything. Raises InvalidAnnouncement.

    Its clock is not checked here, nor does this say that it is news.
    """
    said = unseal_any(envelope)
    if not isinstance(said, Announcement):
        raise InvalidAnnouncement("malformed", "it is no announcement")
    return said


def unseal_any(envelope: bytes) -> Announcement | Suspicion:
    """The same, of either kind."""
    if not SIGNATURE_BYTES < len(envelope) <= MAX_RECORD_BYTES:
        raise InvalidAnnouncement("size", f"it has {len(envelope)} bytes of {MAX_RECORD_BYTES}")
    signature, body = envelope[:SIGNATURE_BYTES], envelope[SIGNATURE_BYTES:]
    plain = expand(_decode(body))
    said: Announcement | Suspicion
    if isinstance(plain, dict) and "accused" in plain:
        said = Suspicion.from_dict(plain)
    else:
        said = Announcement.from_dict(plain)
    if not verify(_speaker(said), _domain(said) + body, signature):
        raise InvalidAnnouncement("signature", "its signature is not that of the peer it names")
    return said


def _speaker(said: Announcement | Suspicion) -> str:
    return said.accuser if isinstance(said, Suspicion) else said.peer_id


def _domain(said: Announcement | Suspicion) -> bytes:
    return _SUSPICION_DOMAIN if isinstance(said, Suspicion) else _DOMAIN


def _decode(body: bytes) -> object:
    try:
        return msgpack.unpackb(
            body,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=_MAX_TEXT_BYTES,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_ext_len=0,
            strict_map_key=False,  # numbers; what else may stand there is left out by ``expand``
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidAnnouncement("malformed", f"not msgpack ({type(error).__name__})") from None
