"""How fast peers are: what they say, until it has been measured.

Units: seconds a token and block, of one row (decode) or of many tokens at once (forward). A peer's
word is taken with two grains of salt: nobody counts for more than ``HEADSTART`` times the median
before somebody measured it here, and afterwards for no more than what was measured.
"""

from __future__ import annotations

import numpy as np

from petalnode.routing.coordinates import Floats

HEADSTART = 4.0
WEIGHT = 0.3
"""Of the newest sample in the running mean."""
MAX_RATIO = 16.0
"""By how much one sample may change a peer's time: one hiccup is not a verdict."""
MEMORY_S = 900.0
"""For how long a measurement counts: whoever was slow gets another chance."""
MAX_PEERS = 1024
"""Peers remembered; the one measured longest ago makes room."""


class SpeedLedger:
    """Running means of measured seconds a block, for one kind of work (decode or forward).

    ``now`` is seconds of any one clock.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}  # (seconds a block, when); oldest first

    def block_s(self, now: float) -> dict[str, float]:
        """What was measured lately, by peer id."""
        return {peer_id: s for peer_id, (s, at) in self._known.items() if now - at < MEMORY_S}

    def observe(self, peer_id: str, block_s: float, now: float) -> None:
        """A token took ``block_s`` seconds a block there. What is no positive number is ignored."""
        if not 0 < block_s < float("inf"):
            return
        known_s, at = self._known.pop(peer_id, (block_s, now))
        if now - at < MEMORY_S:
            block_s = min(max(block_s, known_s / MAX_RATIO), known_s * MAX_RATIO)
            block_s = known_s + WEIGHT * (block_s - known_s)
        self._known[peer_id] = block_s, now
        if len(self._known) > MAX_PEERS:
            del self._known[next(iter(self._known))]

    def forget(self, peer_id: str) -> None:
        """The peer is gone, or has other blocks now."""
        self._known.pop(peer_id, None)


def believed_block_s(said: Floats, measured: Floats, load: Floats) -> Floats:
    """Seconds a block [P] to reckon with.

    ``said`` [P] is advertised, ``measured`` [P] is 0 where nothing was, ``load`` [P] is the factor
    by which work is waiting.
    """
    if not len(said):
        return said
    middle = (len(said) - 1) // 2
    least = float(np.partition(said, middle)[middle]) / HEADSTART
    trusted = np.where(measured > 0, said, np.maximum(said, least))
    believed: Floats = np.maximum(trusted * load, measured)
    return believed
