"""Computing in virtual time: the real functions run inline, and a model of their cost is slept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from petalnode.compute import LIGHT, Load
from petalnode.serving.service import MEASURED_TOKENS, Throughput

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Seconds of a call: ``call_s``, and ``block_s`` for each block gone through (reading its
    weights), and ``token_s`` for each token in each block (the arithmetic)."""

    call_s: float = 0.0
    block_s: float = 0.002
    token_s: float = 0.0001

    def seconds(self, load: Load) -> float:
        """For one call."""
        return self.call_s + load.blocks * self.block_s + load.block_tokens * self.token_s

    def throughput(self, blocks: int) -> Throughput:
        """Tokens/s of a span of so many blocks, as a node would measure it."""
        decode_s = self.seconds(Load(blocks, blocks))
        forward_s = self.seconds(Load(blocks, blocks * MEASURED_TOKENS))
        return Throughput(decode=1.0 / decode_s, forward=MEASURED_TOKENS / forward_s)


class SimCompute:
    """``Compute`` in virtual time, one function at a time. ``slowness()`` multiplies the cost."""

    def __init__(self, cost: Cost, slowness: Callable[[], float]) -> None:
        self._cost = cost
        self._slowness = slowness
        self._one_at_a_time = trio.Lock()

    async def run(self, function: Callable[[], T], load: Load = LIGHT) -> T:
        """See ``Compute``. As in a thread, what has begun cannot be cancelled."""
        async with self._one_at_a_time:
            with trio.CancelScope(shield=True):
                await trio.sleep(self._cost.seconds(load) * self._slowness())
                return function()

    def tell(self, call: Callable[[], None]) -> None:
        """See ``Compute``: this is the event loop."""
        call()
