"""The fields of a record in few bytes: numbers for names, bytes for ids, microseconds.
See ``envelope``.

``expand`` takes anything at all and judges nothing: what is not in the short form stays as it is,
for the checks of the record itself to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import base58

KEYS: Mapping[str, int] = {
    "peer_id": 0,
    "name": 1,
    "fingerprint": 2,
    "start": 3,
    "end": 4,
    "state": 5,
    "decode_tps": 6,
    "forward_tps": 7,
    "kv_tokens_free": 8,
    "queue_depth": 9,
    "dtype": 10,
    "max_context": 11,
    "addrs": 12,
    "seq": 13,
    "issued_at": 14,
    "ttl_s": 15,
    "quant": 16,
    "adapters": 17,
    "version": 18,
    "rtts": 19,
    "bandwidth": 20,
    "moving_to": 21,
    "pinned": 22,
    "accuser": 23,
    "accused": 24,
}
"""On the wire for good: a number is never given to another field. New fields go by their names
until they have one."""
_NAMES = {number: name for name, number in KEYS.items()}
_IDS = ("peer_id", "accuser", "accused")
_MAX_ID_BYTES = 64


def shorten(plain: Mapping[str, Any]) -> dict[str | int, Any]:
    """A valid record's ``to_dict()``, in short form."""
    short = dict(plain)
    for name in _IDS:
        if name in short:
            short[name] = base58.b58decode(short[name])
    if "fingerprint" in short:
        short["fingerprint"] = bytes.fromhex(short["fingerprint"])
    if "addrs" in short:
        short["addrs"] = [addr.removesuffix(_tail(plain["peer_id"])) for addr in short["addrs"]]
    if "rtts" in short:
        short["rtts"] = {peer: _in_us(rtt_s) for peer, rtt_s in short["rtts"].items()}
    return {KEYS.get(name, name): value for name, value in short.items()}


def expand(short: object) -> object:
    """The plain record again, where ``short`` is one; otherwise what was given."""
    if not isinstance(short, dict):
        return short
    plain = {key: value for key, value in short.items() if isinstance(key, str)}
    numbered = {_NAMES[k]: v for k, v in short.items() if type(k) is int and k in _NAMES}
    for name in _IDS:
        value = numbered.get(name)
        if isinstance(value, bytes) and len(value) <= _MAX_ID_BYTES:
            numbered[name] = base58.b58encode(value).decode()
    if isinstance(fingerprint := numbered.get("fingerprint"), bytes):
        numbered["fingerprint"] = fingerprint.hex()
    addrs, peer_id = numbered.get("addrs"), numbered.get("peer_id")
    if isinstance(addrs, list) and isinstance(peer_id, str):
        tail = _tail(peer_id)
        numbered["addrs"] = [a + tail if isinstance(a, str) else a for a in addrs]
    if isinstance(rtts := numbered.get("rtts"), dict):
        numbered["rtts"] = {k: v / 1e6 if type(v) is int else v for k, v in rtts.items()}
    return plain | numbered


def _in_us(rtt_s: float) -> float:
    """As whole microseconds, in half the bytes, where it is no more exact than that."""
    whole = round(rtt_s * 1e6)
    return whole if whole / 1e6 == rtt_s else rtt_s


def _tail(peer_id: str) -> str:
    return f"/p2p/{peer_id}"
