"""Round trips between peers that never measured each other, estimated by network coordinates.

Every peer has a point whose distances, plus a height at both ends for the access links, are round
trips: the model of Vivaldi (Dabek, Cox, Kaashoek, Morris, SIGCOMM 2004). Unlike there, nobody
announces a position: each node relaxes Vivaldi's springs by itself over the round trips that all
peers gossip, so one snapshot is enough. Springs are weighted by the inverse of their length, for it
is the relative error that counts. What a peer alone claims moves that peer and nobody else: a liar
can misplace itself, but not the others.

Chosen by measurement over coordinates that nodes move by themselves and over the triangle bounds of
common neighbours: ``python -m benchmarks routing`` prints the errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

DIMENSIONS = 3
COLD_ROUNDS = 150
"""Rounds of relaxation from nothing; ``WARM_ROUNDS`` are enough after a few changes."""
WARM_ROUNDS = 10
POINT_GAIN = 0.5
HEIGHT_GAIN = 0.25
"""Heights move half as fast as points, else they swallow the distances before these unfold."""
SHORT_S = 1e-2
"""Shorter round trips weigh no more than this one: a claim of nothing must not decide alone."""
_EPSILON_S = 1e-9
_SEED = 0  # of the first positions; every node may have its own


@dataclass(frozen=True)
class Springs:
    """Round trips ``rtt_s[k]`` that ``i[k]`` measured to ``j[k]``, in seconds.

    ``mutual[k]`` is 1 where ``j[k]`` says so too, and 0 where it is the claim of ``i[k]`` alone.
    """

    i: Indices
    j: Indices
    rtt_s: Floats
    mutual: Floats

    def counts(self, peers: int) -> Floats:
        """How many springs move each peer."""
        own: Floats = np.bincount(self.i, minlength=peers).astype(float)
        return own + np.bincount(self.j, self.mutual, peers)


@dataclass(frozen=True)
class Embedding:
    """Places of n peers: ``points`` [n, DIMENSIONS] and ``heights`` [n], in seconds."""

    points: Floats
    heights: Floats

    def rtts(self) -> Floats:
        """The estimated round trips [n, n], in seconds; nonsense for peers without springs."""
        count = len(self.heights)
        squares, apart = np.zeros((count, count)), np.empty((count, count))
        for axis in self.points.T:
            np.subtract(axis[:, None], axis, out=apart)
            np.multiply(apart, apart, out=apart)
            squares += apart
        np.sqrt(squares, out=squares)
        squares += self.heights
        squares += self.heights[:, None]
        return squares


def scatter(count: int, scale_s: float) -> Embedding:
    """Where ``count`` peers start from, at random but always alike."""
    points = np.random.default_rng(_SEED).normal(scale=scale_s, size=(count, DIMENSIONS))
    return Embedding(points, np.full(count, scale_s / 10))


def relax(springs: Springs, start: Embedding, rounds: int) -> Embedding:
    """Let the springs pull for some rounds. Peers without springs stay where they are."""
    points, heights = start.points.copy(), start.heights.copy()
    count = len(heights)
    weights = 1.0 / np.maximum(springs.rtt_s, SHORT_S)
    backwards = springs.mutual

    def gather(values: Floats, sign: float) -> Floats:
        there = np.bincount(springs.j, values * backwards, count)
        return np.bincount(springs.i, values, count) + sign * there

    step = 1.0 / np.maximum(gather(weights, 1.0), _EPSILON_S)
    for _ in range(rounds):
        apart = points[springs.i] - points[springs.j]
        distance = np.sqrt((apart * apart).sum(axis=1)) + _EPSILON_S
        force = springs.rtt_s - distance - heights[springs.i] - heights[springs.j]
        force *= weights
        pull = (force / distance)[:, None] * apart
        for axis in range(points.shape[1]):
            points[:, axis] += POINT_GAIN * step * gather(pull[:, axis], -1.0)
        heights += HEIGHT_GAIN * step * gather(force, 1.0)
        np.maximum(heights, 0.0, out=heights)
    return Embedding(points, heights)
