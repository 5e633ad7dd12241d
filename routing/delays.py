"""How far the peers are from each other and from here: measured, claimed, estimated, unknown.

What a node measured itself it believes. A round trip between two others is what they gossip: where
both do, and disagree, the larger counts; a claim by one end alone counts for no less than what the
round trips from here to both ends allow, nor than half of the estimate by coordinates. So no
peer draws traffic by claiming to be close. A pair without any claim is estimated by network
coordinates, and a peer that nobody measured is taken for a far one, not left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from petalnode.routing.announcement import Announcement, rtt_key
from petalnode.routing.coordinates import (
    COLD_ROUNDS,
    WARM_ROUNDS,
    Embedding,
    Floats,
    Springs,
    relax,
    scatter,
)

UNKNOWN_RTT_S = 0.5
"""Of a pair about which nothing is known."""
MIN_SPRINGS = 2
"""A peer with fewer measured round trips has no place worth estimating by."""
DOUBT = 0.5
"""Share of the estimate by coordinates that a claim by one end alone cannot undercut."""


@dataclass(frozen=True)
class Delays:
    """One-way delays in seconds: ``between`` [P, P] peers, from ``here`` [P] to each peer.

    ``places`` is where the peers and this node are, to start from next time.
    """

    between: Floats
    here: Floats
    places: Mapping[str, tuple[Floats, float]]


def estimate_delays(
    records: Sequence[Announcement],
    own_id: str,
    own_rtts: Mapping[str, float],
    places: Mapping[str, tuple[Floats, float]] | None = None,
) -> Delays:
    """All delays among the peers of ``records`` and from here, given our own measurements.

    ``own_rtts`` maps peer ids to seconds; ``places`` are those of an earlier result.
    """
    names = [a.peer_id for a in records]
    claims, mine = _claims(records, own_id, own_rtts)
    both = np.maximum(claims, claims.T)
    springs = _springs(claims, mine)
    embedding = _embed(springs, [*names, ""], places or {})
    guess = _estimates(springs, embedding)
    here = np.where(np.isnan(mine), guess[-1, :-1], mine)
    between = _settle(claims, both, guess[:-1, :-1], here)
    np.fill_diagonal(between, 0.0)
    found = {
        name: (embedding.points[k], float(embedding.heights[k]))
        for k, name in enumerate([*names, ""])
    }
    return Delays(between / 2, here / 2, found)


def _claims(
    records: Sequence[Announcement], own_id: str, own_rtts: Mapping[str, float]
) -> tuple[Floats, Floats]:
    """What each peer claims of each other [P, P], 0 where nothing; ours [P], NaN where nothing."""
    index = {rtt_key(a.peer_id): k for k, a in enumerate(records)}
    count = len(records)
    # A claim about a peer that is not here goes to a column that is cut off again.
    columns = [index.get(rtt_key(peer_id), count) for a in records for peer_id in a.rtts]
    rows = np.repeat(np.arange(count), [len(a.rtts) for a in records])
    claims = np.zeros((count, count + 1))
    claims[rows, columns] = [rtt_s for a in records for rtt_s in a.rtts.values()]
    claims = claims[:, :-1].copy()
    mine = np.array([own_rtts.get(a.peer_id, np.nan) for a in records], dtype=float)
    own = index.get(rtt_key(own_id)) if own_id else None
    if own is not None:  # our own record may lag behind what we know
        mine[own] = 0.0
        claims[own] = np.where(np.isnan(mine), 0.0, mine)
    return claims, mine


def _springs(claims: Floats, mine: Floats) -> Springs:
    """Every known pair once, from its claimant; this node comes last, as number P."""
    i, j = np.nonzero(claims)
    once = (i < j) | (claims[j, i] == 0)
    i, j = i[once], j[once]
    measured = np.flatnonzero(mine > 0)
    here = np.full(len(measured), len(mine))
    return Springs(
        np.concatenate([i, here]),
        np.concatenate([j, measured]),
        np.concatenate([np.maximum(claims[i, j], claims[j, i]), mine[measured]]),
        np.concatenate([(claims[j, i] > 0).astype(float), np.ones(len(measured))]),
    )


def _embed(
    springs: Springs, names: Sequence[str], places: Mapping[str, tuple[Floats, float]]
) -> Embedding:
    if not len(springs.rtt_s):
        return scatter(len(names), 1.0)
    start = scatter(len(names), float(np.median(springs.rtt_s)))
    known = [k for k, name in enumerate(names) if name in places]
    for k in known:
        start.points[k], start.heights[k] = places[names[k]]
    warm = 2 * len(known) > len(names)
    return relax(springs, start, WARM_ROUNDS if warm else COLD_ROUNDS)


def _estimates(springs: Springs, embedding: Embedding) -> Floats:
    """Round trips by coordinates; unknown where one end has no place worth the name."""
    count = len(embedding.heights)
    guess = np.minimum(embedding.rtts(), UNKNOWN_RTT_S)
    lost = springs.counts(count) < MIN_SPRINGS
    guess[lost, :] = UNKNOWN_RTT_S
    guess[:, lost] = UNKNOWN_RTT_S
    return guess


def _settle(claims: Floats, both: Floats, guess: Floats, here: Floats) -> Floats:
    """One round trip for each pair, by the rules on top of this file."""
    alone = (claims > 0) != (claims.T > 0)
    rtts = np.where(both > 0, both, guess)
    i, j = np.nonzero(alone)
    seen = (here[i] < UNKNOWN_RTT_S) & (here[j] < UNKNOWN_RTT_S)
    placed = guess[i, j] < UNKNOWN_RTT_S
    by_triangle = np.where(seen, np.abs(here[i] - here[j]), 0.0)
    by_place = np.where(placed, DOUBT * guess[i, j], 0.0)
    rtts[i, j] = np.maximum(rtts[i, j], np.maximum(by_triangle, by_place))
    return rtts
