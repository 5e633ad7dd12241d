"""Announcements of real identities for tests: everything valid, whatever is not named."""

from typing import Any

from petalnode.p2p.identity import Identity, new_identity
from petalnode.routing.announcement import Announcement

FINGERPRINT = "0123456789abcdef" * 2
WALL = 1_800_000_000.0


def identity(number: int) -> Identity:
    return new_identity(bytes([number]) * 32)


def record(who: Identity, start: int = 0, end: int = 4, **changes: Any) -> Announcement:
    values: dict[str, Any] = {
        "peer_id": who.peer_id,
        "name": "a node",
        "fingerprint": FINGERPRINT,
        "start": start,
        "end": end,
        "state": "online",
        "decode_tps": 10.0,
        "forward_tps": 100.0,
        "kv_tokens_free": 4096,
        "queue_depth": 0,
        "dtype": "float32",
        "max_context": 2048,
        "addrs": (f"/ip4/127.0.0.1/tcp/4001/p2p/{who.peer_id}",),
        "seq": 1,
        "issued_at": WALL,
        "ttl_s": 30.0,
    }
    return Announcement(**(values | changes))
