"""Announcements for tests: everything valid, whatever is not named."""

from collections.abc import Iterable
from typing import Any

from petalnode.routing.announcement import Announcement
from petalnode.routing.capacity import Board, Seat, bound

FINGERPRINT = "0123456789abcdef" * 2
WALL = 1_800_000_000.0


def record(peer_id: str = "alice", start: int = 0, end: int = 4, **changes: Any) -> Announcement:
    values: dict[str, Any] = {
        "peer_id": peer_id,
        "name": peer_id,
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
        "addrs": (f"/ip4/10.0.0.1/tcp/4001/p2p/{peer_id}",),
        "seq": 1,
        "issued_at": WALL,
        "ttl_s": 30.0,
    }
    return Announcement(**(values | changes))


def swarm_throughput(taken: Iterable[Seat], num_blocks: int) -> float:
    """Tokens/s that peers in their seats carry together."""
    taken = list(taken)
    best = bound(((seat.size, seat.rate) for seat in taken), num_blocks)
    return Board(taken, num_blocks).throughput(best)
