"""A training session without a network: all blocks of a checkpoint, in this process."""

from collections.abc import Sequence
from pathlib import Path

import torch
import trio
from torch import Tensor

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.tuning import NOTHING, Tuning


class Inline:
    """Compute in the caller's own task."""

    async def run(self, function, load=None):
        return function()

    def tell(self, call):
        call()


class LocalTraining:
    """What a tuner asks of a session, and the client's part; each call first calls ``before``."""

    def __init__(self, path: Path | str) -> None:
        self.checkpoint = open_checkpoint(str(path))
        self.client = load_client(self.checkpoint)
        self.tokenizer = self.checkpoint.tokenizer()
        self.compute = Inline()
        self.before = lambda kind: None
        self._span = load_block_span(self.checkpoint, 0, self.checkpoint.config.num_blocks)

    async def forward(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        tuning: Tuning = NOTHING,
        backward: bool = True,
    ) -> tuple[Tensor, tuple]:
        """See ``Training``."""
        self.before("forward")
        await trio.lowlevel.checkpoint()
        forward = ForwardPass(self._span, 0, self._span.end, hidden, lengths, tuning)
        while forward.steps_left:
            forward.step()
        return forward.output, (hidden, lengths, tuning)

    async def backward(self, record: tuple, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Training``."""
        self.before("backward")
        await trio.lowlevel.checkpoint()
        assert not torch.is_inference(grad)
        forward = ForwardPass(self._span, 0, self._span.end, *record, keep=True)
        backward = BackwardPass(forward, grad)
        while backward.steps_left:
            backward.step()
        return backward.grad, backward.tuning_grads
