"""How often a node announces itself, and which round trips it announces: traffic stays flat.

A gossiped record costs every node of the swarm, so in a large swarm each node speaks less often:
the records that one node receives stay at ``1 / PEER_SHARE_S`` a second at most. Changes that
matter (state, span, goodbye) go out at once, and a death is told by ``suspicion``, so that nobody
waits for a record to expire.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping

from petalnode.routing.announcement import MAX_TTL_S, Announcement, rtt_key

BEAT_S = 4.0
"""Between two announcements of a node whose state does not change, in a small swarm."""
SMALL_SWARM = 8
PEER_SHARE_S = 1.25
"""By how much each further peer stretches the interval."""
JITTER = 0.1
"""Share by which an interval varies, so that nodes that started together do not speak in chorus."""
CENSUS = 128
"""Peers met for the first time, the latest, that say how many of a view there really are."""
MISSED_BEATS = 3
"""After so many a record expires."""
ANNOUNCED_RTTS = 8
"""More make the estimates of the others hardly better: ``python -m benchmarks routing``."""
STEADY_RTT = 0.2
"""Share by which a round trip may change before it is announced anew."""


class Census:
    """How many of the listed peers there are, judged by those that were tried.

    Keys cost nothing: thousands of peers that do not exist would make honest ones speak seldom.
    """

    def __init__(self) -> None:
        self._reached: deque[bool] = deque(maxlen=CENSUS)

    def note(self, reached: bool) -> None:
        """A peer that was drawn at random, and never met before, was there or was not."""
        self._reached.append(reached)

    def size(self, listed: int) -> int:
        """Of so many, as many as the share that was reached; one more is taken for reached."""
        share = (1 + sum(self._reached)) / (1 + len(self._reached))
        return max(1, round(listed * share))


def beat_interval(swarm_size: int) -> float:
    """Seconds between two announcements of an unchanged node; ``swarm_size`` counts it too."""
    stretched = BEAT_S + PEER_SHARE_S * max(0, swarm_size - SMALL_SWARM)
    return min(stretched, MAX_TTL_S / MISSED_BEATS / (1 + JITTER))


def next_beat(swarm_size: int, rng: random.Random) -> float:
    """The same with jitter: how long to wait this time."""
    return beat_interval(swarm_size) * rng.uniform(1 - JITTER, 1 + JITTER)


def record_ttl(swarm_size: int) -> float:
    """For how many seconds a record announced in such a swarm lives: three beats, the slowest."""
    return MISSED_BEATS * beat_interval(swarm_size) * (1 + JITTER)


def interesting_peers(
    own: Announcement,
    others: Iterable[Announcement],
    rtts: Mapping[str, float],
    rng: random.Random,
    *,
    limit: int = ANNOUNCED_RTTS,
) -> list[str]:
    """Whose round trips to measure and announce: at most ``limit`` peer ids.

    First half of them: the nearest (by ``rtts``, seconds, else at random) of those that a chain may
    hand over to or take over from, at either end of our span. The rest at random from all, which is
    what network coordinates are estimated by. ``own`` is this node's record.
    """
    others = [a for a in others if a.peer_id != own.peer_id and a.state != "offline"]
    rng.shuffle(others)
    feeders = [a for a in others if a.start < own.start <= a.end]
    followers = [a for a in others if a.start <= own.end < a.end]
    chosen: dict[str, None] = {}
    for neighbours in (feeders, followers):
        nearest = sorted(neighbours, key=lambda a: rtts.get(a.peer_id, float("inf")))
        chosen.update(dict.fromkeys(a.peer_id for a in nearest[: limit // 4]))
    chosen.update(dict.fromkeys(a.peer_id for a in others))
    return list(chosen)[:limit]


def rtts_to_announce(
    measured: Mapping[str, float], wanted: Iterable[str], announced: Mapping[str, float]
) -> dict[str, float]:
    """``measured`` seconds of the ``wanted`` peers, by ``rtt_key``, as an announcement has them.

    What has not changed by more than ``STEADY_RTT`` since it was ``announced`` stays as it was:
    every change makes all others estimate their delays anew.
    """
    found: dict[str, float] = {}
    for peer_id in wanted:
        rtt_s = measured.get(peer_id)
        if rtt_s is None or rtt_s <= 0:
            continue
        key = rtt_key(peer_id)
        before = announced.get(key)
        steady = before is not None and abs(rtt_s - before) <= STEADY_RTT * before
        found[key] = before if before is not None and steady else round(rtt_s, 6) or 1e-6
    return found
