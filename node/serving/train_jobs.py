"""A training job as the span engine takes it: checks of what came and of what comes out, and a
block a step between them. All of it runs in the worker thread."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from petalnode.models.finite import is_finite
from petalnode.models.span import Span
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.tuning import Tuning
from petalnode.serving.rows import Refusal
from petalnode.training.protocol import Job

Tensors = Mapping[str, torch.Tensor]


class JobSteps:
    """See ``petalnode.serving.engine.Steps``. In the end there is a ``refusal``, or ``results`` on
    the CPU and, for what is kept, the ``forward`` pass.

    ``forward``: what a backward job goes back through, where that was kept.
    """

    def __init__(
        self,
        span: Span,
        job: Job,
        inputs: Tensors,
        tuning: Tuning,
        forward: ForwardPass | None = None,
    ) -> None:
        self.job = job
        self.results: Tensors = {}
        self.refusal = why_not_finite(job, inputs)
        keep = job.keep or job.kind == "backward"
        self.forward = forward or ForwardPass(
            span, job.start, job.end, inputs["x"], job.lengths, tuning, keep=keep
        )
        self._pass: ForwardPass | BackwardPass = self.forward
        if job.kind == "backward":
            self._pass = BackwardPass(self.forward, inputs["g"])

    @property
    def steps_left(self) -> int:
        """Blocks forward, again, and back."""
        return 0 if self.refusal else self._pass.steps_left

    def step(self) -> None:
        """Compute one block; after the last, check and collect what came out."""
        if self.refusal:
            return
        self._pass.step()
        if not self._pass.steps_left:
            results = self._outputs()
            self.refusal = why_no_results(self.job, results)
            self.results = {name: tensor.detach().cpu() for name, tensor in results.items()}

    def _outputs(self) -> Tensors:
        if isinstance(self._pass, BackwardPass):
            return {"x": self._pass.grad, **self._pass.tuning_grads}
        return {"x": self._pass.output}


def why_not_finite(job: Job, inputs: Tensors) -> Refusal | None:
    """A refusal that names what came as NaN or infinite."""
    names = {"x": "the hidden states", "g": "the gradient"}
    for name, tensor in inputs.items():
        if not is_finite(tensor):
            what = f"{names[name]} for blocks {job.start}:{job.end}"
            return Refusal("numbers", f"{what} hold numbers that are not finite")
    return None


def why_no_results(job: Job, results: Tensors) -> Refusal | None:
    """A refusal where the computation left what numbers can hold."""
    for tensor in results.values():
        if not is_finite(tensor):
            went = "forward" if job.kind == "forward" else "backward"
            why = f"{went} through blocks {job.start}:{job.end} the numbers become infinite or NaN"
            return Refusal("numbers", why)
    return None
