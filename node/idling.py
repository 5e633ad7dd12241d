"""Which connections a node may close because nobody needs them: their number stays flat.

Probes, round trips and sessions each leave a connection behind, and each of those costs pings, and
copies of what this node announces. So beyond ``SPARE_CONNECTIONS`` those go that carry no stream of
ours and that nobody asks to keep, the longest idle first. Guests, peers that announce nothing, are
counted apart: nobody can dial them, and all that they hear comes over the few that they dialled.
Pure state: time is passed in.

Two nodes do not fight over a connection: whoever is told goodbye leaves the other alone for
``PARTED_S`` unless a session wants it, and both ends compute alike whom they watch (``ring``), so
that neither closes what the other would open again at once.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence

MESH_PEERS = 8
"""Connections that a node looks for, for gossip and measuring."""
SPARE_CONNECTIONS = 2 * MESH_PEERS
"""Up to so many, guests not counted, none is closed."""
SPARE_GUESTS = 64
"""The same of guests."""
IDLE_S = 30.0
"""A connection that is younger, or was in use so lately, stays."""
PARTED_S = 120.0
"""How long neither side of a connection that was closed for idleness dials the other unasked."""
RING_PEERS = 3
"""How many peers a node watches because nobody else may: the next ids after its own."""


class Idleness:
    """When each connection was last in use, as far as was looked."""

    def __init__(self) -> None:
        self._used_at: dict[str, float] = {}

    def surplus(
        self,
        connected: Collection[str],
        in_use: Container[str],
        kept: Container[str],
        guests: Collection[str],
        now: float,
    ) -> list[str]:
        """The peers whose connections to close now. Call it every few seconds.

        ``in_use`` have streams of ours, ``kept`` are wanted for another reason, ``guests`` are
        those of ``connected`` that announce nothing.
        """
        self._used_at = {
            peer_id: now if peer_id in in_use else self._used_at.get(peer_id, now)
            for peer_id in connected
        }
        excess = max(0, len(connected) - len(guests) - SPARE_CONNECTIONS)
        excess_guests = max(0, len(guests) - SPARE_GUESTS)
        closable = [
            peer_id
            for peer_id, used_at in sorted(self._used_at.items(), key=lambda item: item[::-1])
            if peer_id not in kept and now - used_at >= IDLE_S
        ]
        closable_guests = [peer_id for peer_id in closable if peer_id in guests]
        closable_nodes = [peer_id for peer_id in closable if peer_id not in guests]
        return closable_nodes[:excess] + closable_guests[:excess_guests]


def ring(own_id: str, others: Iterable[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Whom ``own_id`` watches, and who watches it: the next and the last ids of a circle of all."""
    ids = sorted(others)
    before = [peer_id for peer_id in ids if peer_id < own_id]
    after = [peer_id for peer_id in ids if peer_id > own_id]
    return [*after, *before][:RING_PEERS], [*after, *before][-RING_PEERS:]
