"""What one session adds to the blocks of its hop: an adapter offered here, or the client's own.

The client's comes in ``tuning`` frames (``petalnode.tuning_wire``) before the first step. It is
charged to the node's room by the frame, checked as a whole, and forgotten with the session.
"""

from __future__ import annotations

from collections import Counter

import torch

from petalnode.compute import Compute
from petalnode.errors import UsageError
from petalnode.models.memory import readable_bytes
from petalnode.models.span import Span
from petalnode.models.tuning.check import check_tuning
from petalnode.models.tuning.tuning import Tuning
from petalnode.p2p.frames import Frame
from petalnode.protocol import BadMessage, Open
from petalnode.serving.rows import Refusal
from petalnode.tensor_frames import TooLarge
from petalnode.tuning_wire import Collector

MAX_SESSION_TUNING_BYTES = 1 << 27
"""What one session may add to the blocks of one hop, in float32, as which it is kept."""
MAX_NODE_TUNING_BYTES = 1 << 29
"""What all of a node's sessions may add together."""
PEER_SHARE = 0.5
"""Of that, for the sessions of one peer: one alone cannot shut the others out."""


class TuningBudget:
    """Room, in bytes, for what the sessions of a node bring, those that train among them.

    A peer may hold ``peer_size`` of it, a session ``session_size``.
    """

    def __init__(self, size: int = MAX_NODE_TUNING_BYTES) -> None:
        self.used = 0
        self.peer_size = int(size * PEER_SHARE)
        self.session_size = min(MAX_SESSION_TUNING_BYTES, self.peer_size)
        self._size = size
        self._held: Counter[str] = Counter()

    def charge(self, peer_id: str, held: int, wanted: int) -> None:
        """Change what a session of that peer holds from ``held`` to ``wanted`` bytes.

        Raises ``Refusal`` where there is no room for more; then nothing has changed.
        """
        more = wanted - held
        if self._held[peer_id] + more > self.peer_size:
            most = readable_bytes(self.peer_size)
            why = f"your sessions would add more than the {most} that those of one peer may"
            raise Refusal("busy", why)
        if self.used + more > self._size:
            raise Refusal("busy", "there is no room for another adapter")
        self.used += more
        self._held[peer_id] += more
        if not self._held[peer_id]:
            del self._held[peer_id]


class SessionTuning:
    """``added`` is what applies to the session's rows: ``served`` from the start, if any."""

    def __init__(
        self,
        opened: Open,
        client: str,
        span: Span,
        compute: Compute,
        budget: TuningBudget,
        served: Tuning | None,
    ) -> None:
        self.added = served
        self._opened, self._client, self._span = opened, client, span
        self._compute, self._budget = compute, budget
        self._collector: Collector | None = Collector(opened.start, opened.end, budget.session_size)
        self._held = 0
        self._refusal: Refusal | None = None

    async def take(self, frame: Frame) -> bool:
        """Take one frame; whether it was the last one.

        Raises ``BadMessage``, or ``Refusal`` with the last frame: whoever sends them all listens
        only then.
        """
        last = frame.header.get("last") is True
        if self._refusal is None:
            if self._collector is None:
                raise BadMessage("an adapter for a session that has one")
            try:
                await self._keep(self._collector, frame)
            except Refusal as refusal:
                self.drop()
                self._refusal = refusal
        if last and self._refusal is not None:
            raise self._refusal
        return last

    def drop(self) -> None:
        """Forget all of it."""
        self.added = None
        self._collector = None
        self._budget.charge(self._client, self._held, 0)
        self._held = 0

    async def _keep(self, collector: Collector, frame: Frame) -> None:
        """Add a frame. Raises ``Refusal`` where that cannot be."""
        if self._opened.adapter:
            raise Refusal("tuning", "the session has an adapter of this node's already")
        most = self._budget.session_size
        try:
            tuning = collector.take(frame)
        except TooLarge:
            why = f"it is larger than the {readable_bytes(most)} that a session may add"
            raise Refusal("tuning", why) from None
        self._budget.charge(self._client, self._held, collector.nbytes)
        self._held = collector.nbytes
        if tuning is None:
            return
        try:
            self.added = await self._compute.run(lambda: self._placed(tuning))
        except UsageError as wrong:
            raise Refusal("tuning", wrong.cause.rstrip(".")) from None
        self._collector = None

    def _placed(self, tuning: Tuning) -> Tuning:
        """What came, checked, on the span's device. Runs in the worker thread."""
        check_tuning(self._span.config, self._opened.start, self._opened.end, tuning)
        device = self._span.device  # a copy: else a small matrix keeps the whole frame it came in
        return tuning.map(lambda tensor: tensor.to(device, torch.float32, copy=True))
