"""What a node takes from the machine that it runs on: network, computing, clock, randomness.

``this_machine()`` is the real one. A simulator brings its own, and everything above runs unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random, SystemRandom

from petalnode.compute import Compute, ComputeThread
from petalnode.models.span import Span
from petalnode.p2p.host import Tap, untapped
from petalnode.p2p.identity import Identity
from petalnode.p2p.wire import TCP, Transport
from petalnode.serving.known_rates import KnownRates, rates_path
from petalnode.serving.service import Measure, Throughput, measure_throughput


def measure_by_clock(span: Span) -> Throughput:
    """How fast the span is here, by real time."""
    return measure_throughput(span, time.perf_counter)


@dataclass(frozen=True)
class Machine:
    """``wall_clock`` gives Unix seconds; ``rng`` makes network ids and chooses gossip partners;
    ``measure`` times a loaded span, ``known_rates`` is what it found earlier; ``identity`` stands
    for the key file that options name."""

    transport: Transport = TCP
    tap: Tap = untapped
    compute: Callable[[], Compute] = ComputeThread
    measure: Measure = measure_by_clock
    wall_clock: Callable[[], float] = time.time
    rng: Random = field(default_factory=SystemRandom)
    identity: Identity | None = None
    known_rates: KnownRates = field(default_factory=KnownRates)


def this_machine() -> Machine:
    """The real one, which remembers how fast it was."""
    return Machine(known_rates=KnownRates(rates_path()))
