"""Rows of tokens as one batch of hidden states, and the loss of what comes out of it.

Rows lie one behind the other, nothing padded; each begins with the soft prompt, if there is one. A
row's last token is not fed: nothing follows it. Suffixes name shapes: T positions of the batch, N
tokens of text that are fed, L tokens that are learned, P prompt tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.models.client import ClientParts
from petalnode.training.encoding import Row

MAX_LOGITS = 1 << 24
"""Numbers of a piece of the logits: 64 MiB, and three times that while their gradient is taken."""


@dataclass(frozen=True, eq=False)
class RowBatch:
    """``lengths`` of the rows as they are fed, of sum T. ``text_N`` and ``prompt`` [rows * P] say
    where in the T positions text and prompts lie; ``learned_L`` which outputs foretell
    ``targets_L``."""

    lengths: list[int]
    ids_N: Tensor
    positions_N: Tensor
    text_N: Tensor
    prompt: Tensor
    learned_L: Tensor
    targets_L: Tensor

    def hidden(self, client: ClientParts, prompt_PH: Tensor | None) -> Tensor:
        """What the first block gets, [T, H], without a graph."""
        text_NH = client.embed_trainable(self.ids_N, self.positions_N)
        hidden_TH = text_NH.new_empty((sum(self.lengths), text_NH.shape[1]))
        hidden_TH[self.text_N] = text_NH
        if prompt_PH is not None:
            hidden_TH[self.prompt] = prompt_PH.detach().to(text_NH).repeat(len(self.lengths), 1)
        return hidden_TH

    def prompt_gradient(self, grad_TH: Tensor) -> Tensor:
        """The gradient [P, H] of the soft prompt, float32, summed over the rows."""
        rows = grad_TH[self.prompt].float()
        return rows.view(len(self.lengths), -1, grad_TH.shape[1]).sum(0)


def make_batch(rows: Sequence[Row], prompt_tokens: int) -> RowBatch:
    """The batch of some rows, each of two tokens or more."""
    lengths: list[int] = []
    ids: list[int] = []
    positions: list[int] = []
    text: list[int] = []
    prompt: list[int] = []
    learned: list[int] = []
    targets: list[int] = []
    begin = 0
    for row in rows:
        fed = len(row.ids) - 1
        first = begin + prompt_tokens
        prompt += range(begin, first)
        text += range(first, first + fed)
        positions += range(prompt_tokens, prompt_tokens + fed)
        ids += row.ids[:fed]
        follows = [at for at in range(1, len(row.ids)) if row.learned[at]]
        learned += [first + at - 1 for at in follows]
        targets += [row.ids[at] for at in follows]
        lengths.append(prompt_tokens + fed)
        begin = first + fed
    whole = (ids, positions, text, prompt, learned, targets)
    return RowBatch(lengths, *(torch.tensor(numbers, dtype=torch.int64) for numbers in whole))


def summed_loss(client: ClientParts, batch: RowBatch, output_TH: Tensor) -> float:
    """The sum over the learned tokens of -log p, in nats."""
    total = 0.0
    with torch.inference_mode():
        for hidden, targets in _pieces(client, batch, output_TH):
            total += float(F.cross_entropy(client.logits(hidden), targets, reduction="sum"))
    return total


def mean_loss_and_gradient(
    client: ClientParts, batch: RowBatch, output_TH: Tensor
) -> tuple[float, Tensor]:
    """The mean of -log p over the learned tokens, and its gradient for the outputs [T, H].

    Logits are made a piece at a time, so that a large vocabulary fits the memory.
    """
    total, grads = 0.0, []
    for hidden, targets in _pieces(client, batch, output_TH):
        with torch.enable_grad():
            leaf = hidden.detach().clone().requires_grad_()
            loss = F.cross_entropy(client.logits_trainable(leaf), targets, reduction="sum")
            (grad,) = torch.autograd.grad(loss / len(batch.targets_L), leaf)
        total += float(loss.detach())
        grads.append(grad)
    grad_TH = torch.zeros_like(output_TH)
    grad_TH[batch.learned_L] = torch.cat(grads).to(grad_TH)
    return total / len(batch.targets_L), grad_TH


def _pieces(client: ClientParts, batch: RowBatch, output_TH: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Learned outputs and what they are to foretell, in pieces."""
    size = max(1, MAX_LOGITS // client.config.vocab_size)
    pieces = zip(
        torch.split(batch.learned_L, size), torch.split(batch.targets_L, size), strict=True
    )
    return [(output_TH[at], targets) for at, targets in pieces]
