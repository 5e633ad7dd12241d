"""Virtual time and a seeded scheduler: what makes a simulated run the same every time.

Trio's ``MockClock`` jumps to the next deadline as soon as every task waits, so that an hour of
heartbeats takes seconds. Trio shuffles the tasks that are ready with a generator of its own; with
its private flag for hypothesis set, the order depends on that generator's seed alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from random import Random
from typing import TypeVar

import trio
import trio._core._run as scheduler
from trio.testing import MockClock

from petalnode.errors import UsageError

T = TypeVar("T")

FLAG = "_ALLOW_DETERMINISTIC_SCHEDULING"
GENERATOR = "_r"
WALL_EPOCH_S = 1_760_000_000.0
"""What the wall clocks of a simulation show at virtual time zero."""


@contextmanager
def seeded_scheduler(seed: int) -> Iterator[None]:
    """Within the context, the order of tasks depends on ``seed`` alone.

    Raises ``UsageError`` where trio no longer has the two names that this rests on.
    """
    generator = getattr(scheduler, GENERATOR, None)
    if not isinstance(generator, Random) or not isinstance(getattr(scheduler, FLAG, None), bool):
        raise UsageError(
            f"Trio {version('trio')} cannot be seeded: its scheduler lacks {FLAG} or {GENERATOR}.",
            "Install a version that simnet/clock.py was written for, such as 0.35.",
        )
    state, flag = generator.getstate(), getattr(scheduler, FLAG)
    generator.seed(seed)
    setattr(scheduler, FLAG, True)
    try:
        yield
    finally:
        setattr(scheduler, FLAG, flag)
        generator.setstate(state)


def check_virtual() -> None:
    """Raise ``UsageError`` unless the running loop has a virtual clock."""
    if not isinstance(trio.lowlevel.current_clock(), MockClock):
        raise UsageError(
            "A simulated network needs a virtual clock, and this loop runs in real time.",
            "Use run_virtual, or pytest-trio's autojump_clock.",
        )


def run_virtual(main: Callable[[], Awaitable[T]], seed: int = 0) -> T:
    """``trio.run`` in virtual time; returns what ``main`` returns."""
    with seeded_scheduler(seed):
        return trio.run(main, clock=MockClock(autojump_threshold=0))
