"""The one worker thread of a device: all torch work of a node goes through here, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class ComputeThread:
    """Runs functions one at a time off the event loop, first come first served.

    A caller that is cancelled while its function runs waits for it to end: the caches that the
    function writes must not be freed under it.
    """

    def __init__(self) -> None:
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result, or what it raised."""
        return await trio.to_thread.run_sync(function, limiter=self._one_at_a_time)
