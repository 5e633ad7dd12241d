"""Forward and backward of a micro-batch through some blocks of a span, one block a step.

Weights are frozen: gradients are those of the input and of what the client adds. A pass keeps
nothing in the span and takes no cache; rows are whole, one after the other, nothing padded. What
else the node computes may come between two steps, in the same thread.

Suffixes name shapes: T tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from petalnode.errors import LocalProtocolError
from petalnode.models.layers.ragged import RaggedBatch, WholeRow
from petalnode.models.span import Span
from petalnode.models.tuning.rows import TunedRows
from petalnode.models.tuning.tuning import NOTHING, Tuning

MAX_GRAPH_BYTES = 1 << 30
"""What the graphs of one backward pass may take, unless that of a single block takes more."""


class ForwardPass:
    """Hidden states x [T, H] through the blocks [start, end), without a graph.

    `lengths` of the rows sum up to T. `output` [T, H], in the span's dtype and on its device, is
    what the steps so far made of x. Raises `LocalProtocolError` for what does not fit.
    """

    def __init__(
        self,
        span: Span,
        start: int,
        end: int,
        x: Tensor,
        lengths: Sequence[int],
        tuning: Tuning = NOTHING,
    ) -> None:
        self._blocks = _Blocks(span, start, end, x, lengths, tuning)
        self._next = start
        self.output = self._blocks.place(x)

    @property
    def steps_left(self) -> int:
        """Blocks to go."""
        return self._blocks.end - self._next

    def step(self) -> None:
        """Compute one block."""
        with torch.no_grad():
            self.output = self._blocks.run(self._next, self.output)
        self._next += 1


class BackwardPass:
    """The gradient [T, H] of the output of the blocks [start, end), back to their input x.

    First each block is computed again, with a graph of its own; then the graphs are gone through
    from the last block to the first: two steps a block. Where the graphs would be larger than
    `MAX_GRAPH_BYTES` together, those of the first blocks are made once more when they are needed,
    a third step each. In the end `grad` [T, H] is the gradient of x, in the span's dtype, and
    `tuning_grads` has the gradients of `tuning`'s tensors for these blocks, float32, by the names
    of `Tuning.named`.
    """

    def __init__(
        self,
        span: Span,
        start: int,
        end: int,
        x: Tensor,
        lengths: Sequence[int],
        tuning: Tuning,
        grad: Tensor,
    ) -> None:
        leaves = tuning.within(start, end).leaves(span.device)
        self._blocks = _Blocks(span, start, end, x, lengths, leaves)
        if grad.shape != x.shape:
            raise LocalProtocolError(
                f"A gradient of shape {list(grad.shape)} does not fit {list(x.shape)}."
            )
        self._named = list(leaves.named())
        self._inputs = [self._blocks.place(x)]
        """Of the blocks that the gradient has not passed, and of the next to compute again."""
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self._computed, self._kept = start, end - start
        self.grad = self._blocks.place(grad)
        self.tuning_grads: dict[str, Tensor] = {}

    @property
    def steps_left(self) -> int:
        """Blocks to compute (again), and graphs to go through."""
        whole = 2 * (self._blocks.end - self._computed) + len(self._graphs)
        dropped = len(self._inputs) - 1 - len(self._graphs)
        return whole + 2 * dropped

    def step(self) -> None:
        """Compute one block again, or go back through one."""
        if self._computed < self._blocks.end:
            self._compute()
            return
        index = self._blocks.start + len(self._inputs) - 2
        if index in self._graphs:
            self._go_back(index)
        else:
            self._graphs[index] = self._graph(index)

    def _compute(self) -> None:
        """Compute the next block; the first shows how many graphs can be kept, of the last."""
        index = self._computed
        first = index == self._blocks.start
        with _Saved() if first else nullcontext() as saved:
            kept = first or self._blocks.end - index <= self._kept
            x, y = self._graph(index) if kept else self._plain(index)
        if saved is not None:
            self._kept = max(1, MAX_GRAPH_BYTES // max(1, saved.nbytes))
        if self._blocks.end - index <= self._kept:
            self._graphs[index] = (x, y)
        self._inputs.append(y.detach())
        self._computed += 1

    def _graph(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a block's input, which is a leaf, and its output with a graph."""
        with torch.enable_grad():
            x = self._inputs[index - self._blocks.start].detach().requires_grad_()
            return x, self._blocks.run(index, x)

    def _plain(self, index: int) -> tuple[Tensor, Tensor]:
        x = self._inputs[index - self._blocks.start]
        with torch.no_grad():
            return x, self._blocks.run(index, x)

    def _go_back(self, index: int) -> None:
        x, y = self._graphs.pop(index)
        self._inputs.pop()
        own = [(name, leaf) for name, leaf in self._named if name.startswith(f"{index}.")]
        wanted = [x, *(leaf for _, leaf in own)]
        self.grad, *grads = torch.autograd.grad(y, wanted, self.grad, materialize_grads=True)
        self.tuning_grads |= {name: g for (name, _), g in zip(own, grads, strict=True)}


class _Saved:
    """Counts the bytes of what a graph keeps, weights left out."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda one: one)

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.requires_grad and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor.detach()  # itself, it would keep the graph alive that keeps it


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
        tuning = tuning.map(lambda tensor: tensor.to(span.device))
        rows = [WholeRow(n, tuning) for n in lengths]
        self._batch = RaggedBatch(rows, span.dtype, span.device)
        self._tuned = TunedRows(rows)

    def place(self, x: Tensor) -> Tensor:
        """Return a tensor of the caller's as the span takes it; autograd can save it."""
        x = x.detach().to(dtype=self._span.dtype, device=self._span.device)
        return x.clone() if x.is_inference() else x

    def run(self, index: int, x: Tensor) -> Tensor:
        """Return the output of one block."""
        return self._span.run_block(index, x, self._batch, self._tuned)
