"""The one worker thread of a device: all torch work of a node goes through here, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """How much work a function is: blocks gone through, and tokens summed over these blocks."""

    blocks: int = 0
    block_tokens: int = 0


LIGHT = Load()
"""Work beside the blocks."""


class Compute(Protocol):
    """Where a node's torch work runs. A simulator charges ``load`` in virtual time."""

    async def run(self, function: Callable[[], T], load: Load = LIGHT) -> T:
        """The function's result, or what it raised."""

    def tell(self, call: Callable[[], None]) -> None:
        """Called by a function while it runs: make this call on the event loop.

        Raises what ends the function where its caller is cancelled: a download stops there.
        """


class ComputeThread:
    """Runs functions one at a time off the event loop, first come first served.

    A caller that is cancelled while its function runs waits for it to end: the caches that the
    function writes must not be freed under it.
    """

    def __init__(self) -> None:
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def run(self, function: Callable[[], T], load: Load = LIGHT) -> T:
        """See ``Compute``. It takes as long as it takes, whatever ``load`` says."""
        return await trio.to_thread.run_sync(function, limiter=self._one_at_a_time)

    def tell(self, call: Callable[[], None]) -> None:
        """See ``Compute``."""
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(call)
