"""Which peers a session goes through: fewest hops, then the least sum of round trips. Exact.

``best(b)``, the cheapest way to cover ``[b, L)``, never grows with ``b``: a chain from ``b`` also
covers any later start once it is trimmed. So a hop always runs to the end of its peer's span, and
one backward pass over the block boundaries decides everything: O(blocks x peers).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from petalnode.errors import NoRoute
from petalnode.routing.announcement import Announcement

UNKNOWN_RTT_S = 0.5  # an unmeasured peer is taken for a far one, not left out


@dataclass(frozen=True)
class Hop:
    """One stage of a chain: ``peer_id`` runs blocks ``[start, end)``, a part of its span.

    ``rtt_s`` is the round trip from here, None while unmeasured.
    """

    peer_id: str
    start: int
    end: int
    rtt_s: float | None = None


@dataclass(frozen=True, order=True)
class Cost:
    """What a chain costs; the smaller one wins, field by field."""

    hops: int = 0
    rtt_s: float = 0.0

    def plus_hop(self, rtt_s: float | None) -> "Cost":
        return Cost(self.hops + 1, self.rtt_s + (UNKNOWN_RTT_S if rtt_s is None else rtt_s))


def choose_chain(
    announcements: Iterable[Announcement],
    num_blocks: int,
    *,
    rtts: Mapping[str, float],
    exclude: Collection[str] = (),
) -> tuple[Hop, ...]:
    """The cheapest chain over ``[0, num_blocks)``; ties go to the smaller peer id.

    ``rtts`` maps peer ids to seconds. Only peers that are online take part, ``exclude`` does not.
    Raises NoRoute, which names the blocks that nobody is left to serve.
    """
    peers = sorted(
        (a for a in announcements if _serves(a, num_blocks) and a.peer_id not in exclude),
        key=lambda a: a.peer_id,
    )
    missing = uncovered(peers, num_blocks)
    if missing:
        raise NoRoute(
            f"{_in_words(missing)} served by nobody.",
            "Start a node that holds them, or wait for one to join.",
            missing,
        )
    return _walk(peers, num_blocks, rtts)


def uncovered(announcements: Iterable[Announcement], num_blocks: int) -> tuple[int, ...]:
    """The blocks of ``[0, num_blocks)`` that are in no span."""
    covered = {block for a in announcements for block in range(a.start, a.end)}
    return tuple(block for block in range(num_blocks) if block not in covered)


def _serves(announcement: Announcement, num_blocks: int) -> bool:
    return announcement.state == "online" and announcement.end <= num_blocks


def _walk(
    peers: Sequence[Announcement], num_blocks: int, rtts: Mapping[str, float]
) -> tuple[Hop, ...]:
    best = [Cost()] * (num_blocks + 1)
    first: list[Announcement | None] = [None] * (num_blocks + 1)
    for block in reversed(range(num_blocks)):
        ways = [
            (best[a.end].plus_hop(rtts.get(a.peer_id)), a.peer_id, a)
            for a in peers
            if a.start <= block < a.end
        ]
        best[block], _, first[block] = min(ways, key=lambda way: way[:2])
    hops = []
    block = 0
    while (peer := first[block]) is not None:
        hops.append(Hop(peer.peer_id, block, peer.end, rtts.get(peer.peer_id)))
        block = peer.end
    return tuple(hops)


def _in_words(blocks: Sequence[int]) -> str:
    """As in "Blocks 3 to 5 and block 9 are"; ``blocks`` ascend."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block - 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    words = [f"block {a}" if a == b else f"blocks {a} to {b}" for a, b in ranges]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{listed[0].upper()}{listed[1:]} {'is' if len(blocks) == 1 else 'are'}"
