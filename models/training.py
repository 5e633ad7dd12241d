"""Forward and backward of a micro-batch through some blocks of a span, one block a step.

Weights are frozen: gradients are those of the input and of what the client adds. A pass keeps
nothing in the span and takes no cache; rows are whole, one after the other, nothing padded. What
else the node computes may come between two steps, in the same thread.

Going back through a block needs its activations. They are computed again from the block's input
(checkpointing, arXiv 1604.06174), one block's at a time; ahead of the gradient, where somebody asks
for it and has the memory.

Suffixes name shapes: T tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from petalnode.errors import LocalProtocolError
from petalnode.models.layers.ragged import RaggedBatch, WholeRow
from petalnode.models.layers.weights import storage_of
from petalnode.models.span import Span
from petalnode.models.tuning.rows import TunedRows
from petalnode.models.tuning.tuning import NOTHING, Tuning

NODE_BYTES = 1 << 10
"""More than a node of a graph takes that holds no tensors."""


class ForwardPass:
    """Hidden states x [T, H] through the blocks [start, end), without their activations.

    `lengths` of the rows sum up to T. `output` [T, H], in the span's dtype and on its device, is
    what the steps so far made of x. With `keep`, a `BackwardPass` can follow: the blocks' inputs
    stay, and what leads back through them. Raises `LocalProtocolError` for what does not fit.
    """

    def __init__(
        self,
        span: Span,
        start: int,
        end: int,
        x: Tensor,
        lengths: Sequence[int],
        tuning: Tuning = NOTHING,
        *,
        keep: bool = False,
    ) -> None:
        self._given = tuning.within(start, end)
        if keep:
            tuning = self._given.leaves(span.device)
        self.blocks = _Blocks(span, start, end, x, lengths, tuning)
        self.kept: list[_Checkpoint] | None = [] if keep else None
        self._next = start
        self.output = self.blocks.place(x)

    @property
    def steps_left(self) -> int:
        """Blocks to go."""
        return self.blocks.end - self._next

    @property
    def nbytes(self) -> int:
        """Bytes kept for a backward pass: inputs, graphs, and matrices in float32 that came in
        another dtype."""
        kept = self.kept or []
        blocks = sum(one.y.nbytes + one.nodes * NODE_BYTES for one in kept)
        converted = sum(4 * t.numel() for _, t in self._given.named() if t.dtype != torch.float32)
        return blocks + (kept[0].x.nbytes + converted if kept else 0)

    def step(self) -> None:
        """Compute one block."""
        index = self._next
        if self.kept is None:
            with torch.no_grad():
                self.output = self.blocks.run(index, self.output)
        else:
            run = partial(self.blocks.run, index)
            self.kept.append(_Checkpoint(run, self.output, self.blocks.holds))
            self.output = self.kept[-1].y.detach()
        self._next += 1
        if not self.steps_left:
            self.blocks.rest()

    @property
    def next_activations(self) -> int:
        """Bytes that `restore` would bring, about; 0 where all blocks have theirs."""
        following = self._to_restore()
        return 0 if following is None else following.activations

    def restore(self) -> None:
        """Compute the activations of one block again, the last that lacks them: a backward pass
        that follows needs not."""
        following = self._to_restore()
        if following is not None:
            try:
                following.restore()
            finally:
                self.blocks.rest()

    def let_go(self) -> int:
        """Drop the activations that `restore` brought last; how many bytes they were, about."""
        last = next((one for one in self.kept or () if one.restored), None)
        if last is None:
            return 0
        last.let_go()
        return last.activations

    def _to_restore(self) -> _Checkpoint | None:
        return next((one for one in reversed(self.kept or ()) if not one.restored), None)


class BackwardPass:
    """The gradient [T, H] of a forward pass's output, back to its input x.

    `forward` was made with `keep`; what it did not compute yet is computed first, and what it keeps
    is used up. Two steps a block, from the last to the first: its activations once more, where they
    are not there yet, and back through it. In the end `grad` [T, H] is the gradient of x, in the
    span's dtype, and `tuning_grads` has the gradients of the tuning's tensors for these blocks,
    float32, by the names of `Tuning.named`.
    """

    def __init__(self, forward: ForwardPass, grad: Tensor) -> None:
        if forward.kept is None or grad.shape != forward.output.shape:
            raise LocalProtocolError(
                f"A gradient of shape {list(grad.shape)} does not fit a forward pass of "
                f"{list(forward.output.shape)} that {'forgot' if forward.kept is None else 'kept'} "
                "the way."
            )
        self._forward, self._kept = forward, forward.kept
        self._named = list(forward.blocks.tuning.named())
        self.grad = forward.blocks.place(grad)
        self.tuning_grads: dict[str, Tensor] = {}

    @property
    def steps_left(self) -> int:
        """Blocks to compute, to compute again, and to go back through."""
        there = self._forward.steps_left
        restored = sum(one.restored for one in self._kept)
        return there + 2 * (there + len(self._kept)) - restored

    def step(self) -> None:
        """Compute one block (again), or go back through one."""
        if self._forward.steps_left:
            self._forward.step()
        elif not self._kept[-1].restored:
            self._kept[-1].restore()
        else:
            self._go_back()

    def _go_back(self) -> None:
        one = self._kept.pop()
        index = self._forward.blocks.start + len(self._kept)
        own = [(name, leaf) for name, leaf in self._named if name.startswith(f"{index}.")]
        wanted = [one.x, *(leaf for _, leaf in own)]
        self.grad, *grads = torch.autograd.grad(one.y, wanted, self.grad, materialize_grads=True)
        self.tuning_grads |= {name: g for (name, _), g in zip(own, grads, strict=True)}


class _Checkpoint:
    """A function's leaf `x` and output `y`, with a graph whose activations are computed when they
    are needed.

    As in `torch.utils.checkpoint`, which does so in the midst of going back: here it is a step of
    its own, so that others wait for less.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], x: Tensor, is_held: Callable[[Tensor], bool]
    ) -> None:
        self._run = run
        at = storage_of(x)
        # The graph holds it: it may not hold the graph.
        self._saved = saved = _Saved(lambda one: storage_of(one) == at or is_held(one))
        self.x = x.detach().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.drop, saved.get)
        with torch.enable_grad(), hooks:
            self.y = run(self.x)
        self.nodes = _nodes(self.y)

    @property
    def restored(self) -> bool:
        """Whether the graph can be gone through."""
        return len(self._saved.tensors) == len(self._saved.noted)

    @property
    def activations(self) -> int:
        """Bytes that the graph takes, once it is restored, beyond what is in memory anyway."""
        return self._saved.nbytes

    def let_go(self) -> None:
        """Forget the activations."""
        self._saved.tensors.clear()

    def restore(self) -> None:
        """Run the function again, up to the last activation that the graph needs."""
        saved = self._saved
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.take, saved.get)
        try:
            with torch.enable_grad(), hooks:
                self._run(self.x.detach().requires_grad_())
            raise LocalProtocolError("A block computed less the second time.")
        except _AllTaken:
            return
        finally:
            if not self.restored:
                saved.tensors.clear()


def _nodes(y: Tensor) -> int:
    """How many nodes the graph of a tensor has."""
    seen = {y.grad_fn}
    ahead = [y.grad_fn]
    while ahead:
        node = ahead.pop()
        new = {after for after, _ in node.next_functions} - seen if node is not None else set()
        seen |= new
        ahead += new
    return len(seen)


class _Saved:
    """What a graph saved, in order: noted first, and kept when it comes again."""

    def __init__(self, is_held: Callable[[Tensor], bool]) -> None:
        self.noted: list[tuple[torch.Size, torch.dtype]] = []
        self.tensors: list[Tensor] = []
        self.nbytes = 0
        self._is_held = is_held

    def drop(self, tensor: Tensor) -> int:
        """Only note what it was."""
        self.noted.append((tensor.shape, tensor.dtype))
        self.nbytes += 0 if self._is_held(tensor) else tensor.nbytes
        return len(self.noted) - 1

    def take(self, tensor: Tensor) -> int:
        """Keep it, without the graph that it came from. Raises `_AllTaken` with the last one, and
        `LocalProtocolError` for another than was noted: its gradient would be wrong."""
        if (tensor.shape, tensor.dtype) != self.noted[len(self.tensors)]:
            raise LocalProtocolError("A block computed something else the second time.")
        self.tensors.append(tensor.detach())
        if len(self.tensors) == len(self.noted):
            raise _AllTaken
        return len(self.tensors) - 1

    def get(self, number: int) -> Tensor:
        """Return what was taken."""
        return self.tensors[number]


class _AllTaken(Exception):
    """Nothing that is still to be computed is needed."""


class _Blocks:
    """Some blocks of a span and the batch that goes through them."""

    def __init__(
        self,
        span: Span,
        start: int,
        end: int,
        x: Tensor,
        lengths: Sequence[int],
        tuning: Tuning,
    ) -> None:
        span.check_range(start, end)
        fits = x.shape == (sum(lengths), span.config.hidden_size)
        if not fits or min(lengths, default=0) < 1:
            raise LocalProtocolError(f"A batch of shape {list(x.shape)} does not fit its rows.")
        self.start, self.end, self._span = start, end, span
        self.tuning = tuning.map(lambda tensor: tensor.to(span.device))
        self._added = {storage_of(tensor) for _, tensor in self.tuning.named()}
        self._rows = [WholeRow(n, self.tuning) for n in lengths]
        self._tuned = TunedRows(self._rows)
        self.rest()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in memory as long as the pass is: a weight, or what is added."""
        return storage_of(tensor) in self._added or self._span.has_weight(tensor)

    def rest(self) -> None:
        """Let go of what blocks share in a pass: a mask is as long as a row, squared."""
        self._batch = RaggedBatch(self._rows, self._span.dtype, self._span.device)

    def place(self, x: Tensor) -> Tensor:
        """Return a tensor of the caller's as the span takes it; autograd can save it."""
        x = x.detach().to(dtype=self._span.dtype, device=self._span.device)
        return x.clone() if x.is_inference() else x

    def run(self, index: int, x: Tensor) -> Tensor:
        """Return the output of one block."""
        return self._span.run_block(index, x, self._batch, self._tuned)
