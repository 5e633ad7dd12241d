"""A signed announcement as bytes: what gossip carries, snapshots repeat and views keep.

    64 bytes Ed25519 signature | msgpack map of the record

The signature covers a domain tag and the map, and is checked against the key that the record's own
``peer_id`` embeds: an envelope needs no further proof, whoever passed it on.
"""

import msgpack

from petalnode.p2p.identity import SIGNATURE_BYTES, Identity, verify
from petalnode.routing.announcement import Announcement, InvalidAnnouncement

MAX_RECORD_BYTES = 4096
_DOMAIN = b"petalnode announcement 1\0"  # no signature made for another purpose fits
_MAX_ITEMS = 64  # in any one list or map of a record
_MAX_TEXT_BYTES = 256


def seal(identity: Identity, announcement: Announcement) -> bytes:
    """The envelope of our own announcement. Raises InvalidAnnouncement ("size", "signer")."""
    if announcement.peer_id != identity.peer_id:
        raise InvalidAnnouncement("signer", "it is about another peer than the one who signs")
    body: bytes = msgpack.packb(announcement.to_dict())
    envelope = identity.sign(_DOMAIN + body) + body
    if len(envelope) > MAX_RECORD_BYTES:
        raise InvalidAnnouncement("size", f"it has {len(envelope)} bytes of {MAX_RECORD_BYTES}")
    return envelope


def unseal(envelope: bytes) -> Announcement:
    """The checked record in ``envelope``, which may be anything. Raises InvalidAnnouncement.

    Its clock is not checked here, nor does this say that it is news.
    """
    if not SIGNATURE_BYTES < len(envelope) <= MAX_RECORD_BYTES:
        raise InvalidAnnouncement("size", f"it has {len(envelope)} bytes of {MAX_RECORD_BYTES}")
    signature, body = envelope[:SIGNATURE_BYTES], envelope[SIGNATURE_BYTES:]
    announcement = Announcement.from_dict(_decode(body))
    if not verify(announcement.peer_id, _DOMAIN + body, signature):
        raise InvalidAnnouncement("signature", "its signature is not that of the peer it names")
    return announcement


def _decode(body: bytes) -> object:
    try:
        return msgpack.unpackb(
            body,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=_MAX_TEXT_BYTES,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidAnnouncement("malformed", f"not msgpack ({type(error).__name__})") from None
