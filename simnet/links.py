"""Links between simulated hosts, one object a direction, and rules that interfere with them.

A link has a latency, a jitter, a bandwidth and a rate of loss, and may be down. All of these may be
changed at any time. What a link does is drawn from its own generator, so that the traffic of one
link never changes the luck of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

SEGMENT_BYTES = 1448


@dataclass(eq=False)
class Link:
    """From ``source`` to ``target``. ``jitter_s`` is the most that is added to the latency,
    ``bandwidth`` is in bytes a second and shared by all connections, ``loss`` is the share of TCP
    segments lost, ``is_up`` False loses everything."""

    source: str
    target: str
    rng: Random
    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth: float = math.inf
    loss: float = 0.0
    is_up: bool = True
    free_at: float = 0.0

    def loses(self, size: int) -> bool:
        """Whether some segment of ``size`` bytes is lost. Draws only where there is loss."""
        if not self.is_up:
            return True
        if not self.loss:
            return False
        segments = max(1, math.ceil(size / SEGMENT_BYTES))
        return self.rng.random() >= (1.0 - self.loss) ** segments

    def arrival(self, size: int, now: float) -> float:
        """When the last of ``size`` bytes arrives that are sent now, behind what is queued."""
        self.free_at = max(self.free_at, now) + size / self.bandwidth
        jitter = self.rng.uniform(0.0, self.jitter_s) if self.jitter_s else 0.0
        return self.free_at + self.latency_s + jitter

    def backlog_s(self, now: float) -> float:
        """How long it takes until what was sent so far is on its way."""
        return max(0.0, self.free_at - now)


@dataclass(frozen=True)
class Parcel:
    """Bytes of one connection about to cross a link. ``total`` is what crossed it before."""

    at: float
    source: str
    target: str
    size: int
    total: int


@dataclass(eq=False)
class Rule:
    """What happens to parcels that ``matches`` accepts: ``act`` is called, ``delay_s`` is added, or
    they are lost and sent again later, as TCP does. It goes away after so many ``times``, or at
    virtual time ``until``."""

    matches: Callable[[Parcel], bool]
    act: Callable[[Parcel], None] | None = None
    delay_s: float = 0.0
    lose: bool = False
    times: int = 1
    until: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether it has done all it will."""
        return self.times <= 0
