"""What one session adds to the blocks of its hop: an adapter offered here, or the client's own.

The client's comes in ``tuning`` frames (``petalnode.tuning_wire``) before the first step. It is
charged to the node's room by the frame, checked as a whole, and forgotten with the session.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petalnode.errors import UsageError
from petalnode.models.span import Span
from petalnode.models.tuning.check import check_tuning
from petalnode.models.tuning.tuning import Tuning
from petalnode.p2p.frames import Frame
from petalnode.protocol import BadMessage, Open
from petalnode.serving.budget import KvBudget
from petalnode.serving.rows import Refusal
from petalnode.tuning_wire import Collector

MAX_SESSION_TUNING_BYTES = 1 << 27
"""What one session may add to the blocks of one hop, in float32, as which it is kept."""
MAX_NODE_TUNING_BYTES = 1 << 29
"""What all of a node's sessions may add together."""


def tuning_budget() -> KvBudget:
    """Room, in bytes, for what the sessions of a node bring."""
    return KvBudget(MAX_NODE_TUNING_BYTES, 1)


def held_bytes(tensor: Tensor) -> int:
    """What a matrix takes here, whatever its dtype on the way."""
    return tensor.numel() * torch.float32.itemsize


class SessionTuning:
    """``added`` is what applies to the session's rows: ``served`` from the start, if any."""

    def __init__(self, opened: Open, span: Span, budget: KvBudget, served: Tuning | None) -> None:
        self.added = served
        self._opened, self._span, self._budget = opened, span, budget
        self._collector: Collector | None = self._new_collector()
        self._held = 0
        self._refusal: Refusal | None = None

    def take(self, frame: Frame) -> bool:
        """Take one frame; whether it was the last one.

        Raises ``BadMessage``, or ``Refusal`` with the last frame: whoever sends them all listens
        only then.
        """
        if self._collector is None:
            raise BadMessage("an adapter for a session that has one")
        last = frame.header.get("last") is True
        if self._refusal is None:
            self._refusal = self._keep(frame)
        if last and self._refusal is not None:
            raise self._refusal
        return last

    def drop(self) -> None:
        """Forget all of it."""
        self.added = self._collector = None
        self._budget.resize(self._held, 0)
        self._held = 0

    def _keep(self, frame: Frame) -> Refusal | None:
        """Add a frame; why that cannot be, if it cannot. Then nothing is kept."""
        assert self._collector is not None
        wanted = self._held + sum(map(held_bytes, frame.tensors))
        if wanted > MAX_SESSION_TUNING_BYTES:
            why = (
                f"it is larger than the {MAX_SESSION_TUNING_BYTES >> 20} MiB that a session may add"
            )
            return self._refuse("tuning", why)
        if not self._budget.resize(self._held, wanted):
            return self._refuse("busy", "there is no room for another adapter")
        self._held = wanted
        tuning = self._collector.take(frame)
        if tuning is None:
            return None
        try:
            if self._opened.adapter:
                raise UsageError("The session has an adapter of this node's already.")
            check_tuning(self._span.config, self._opened.start, self._opened.end, tuning)
        except UsageError as wrong:
            return self._refuse("tuning", wrong.cause)
        self.added, self._collector = tuning.to(torch.float32, self._span.device), None
        return None

    def _refuse(self, code: str, why: str) -> Refusal:
        self.drop()
        self._collector = self._new_collector()
        return Refusal(code, why)

    def _new_collector(self) -> Collector:
        start, end = self._opened.start, self._opened.end
        return Collector(self._span.config, start, end, MAX_SESSION_TUNING_BYTES)
