"""What transformers' callers give a model, checked, and the positions that follow from it.

B rows of T new columns behind C that a cache has. A row's positions count its tokens from 0;
padding, wherever it lies, has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from petalnode.errors import UsageError
from petalnode.training.inputs import check_mask, check_tensor

ID_DTYPES = (torch.int64, torch.int32)
"""What embeddings can be looked up by."""
IGNORED = -100
"""The label of what no loss is made of."""


@dataclass(frozen=True)
class Inputs:
    """``tokens``: ids [B, T] or embeddings [B, T, H]; ``mask`` and ``positions`` [B, T] of them."""

    tokens: Tensor
    mask: Tensor
    positions: Tensor


def read_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cached: Tensor | None,
) -> Inputs:
    """Return what is to be computed behind the columns ``cached`` [B, C], or say what is wrong."""
    tokens = _one_of(input_ids, inputs_embeds)
    batch, columns = tokens.shape[:2]
    before = torch.zeros(batch, 0, dtype=torch.bool) if cached is None else cached
    if len(before) != batch:
        raise UsageError(
            f"The cache has {len(before)} rows, the batch {batch}.",
            "Feed it the rows that it was begun with.",
        )
    mask = torch.ones(batch, columns, dtype=torch.bool)
    if attention_mask is not None:
        whole = check_mask(attention_mask, batch, before.shape[1] + columns).cpu()
        mask = whole[:, before.shape[1] :]
        if not torch.equal(whole[:, : before.shape[1]], before):
            raise UsageError(
                "The attention mask is another than the cache was made with.",
                "Only add columns to it, or begin with a new cache.",
            )
    counted = (before.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
    if position_ids is not None:
        _check_positions(position_ids, counted, mask)
    return Inputs(tokens, mask, counted)


def refuse_attentions(wanted: bool | None) -> None:
    """Raise ``UsageError`` if attention weights are wanted."""
    if wanted:
        raise UsageError("Attention weights stay on the hops.", "Leave output_attentions out.")


def _one_of(ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """Return the ids [B, T] or the embeddings [B, T, H], whichever is given."""
    tokens = ids if embeddings is None else embeddings
    if tokens is None or (ids is not None and embeddings is not None):
        raise UsageError("Exactly one of input_ids and inputs_embeds is needed.", "Give that one.")
    check_tensor("The input", tokens)
    right = tokens.dtype in ID_DTYPES if embeddings is None else tokens.is_floating_point()
    if not right or tokens.ndim != (2 if embeddings is None else 3) or not tokens.numel():
        raise UsageError(
            f"Inputs of shape {tuple(tokens.shape)} and {tokens.dtype} are no rows of tokens.",
            "Give ids as integers [batch, tokens], or embeddings as floating point numbers "
            "[batch, tokens, hidden size].",
        )
    return tokens


def _check_positions(given: Tensor, counted: Tensor, mask: Tensor) -> None:
    if given.ndim != 2 or given.shape[1] != counted.shape[1] or len(given) not in (1, len(counted)):
        raise UsageError(
            f"Positions of shape {tuple(given.shape)} do not fit the inputs.", "Leave them out."
        )
    if not torch.equal(given.cpu().expand_as(counted)[mask], counted[mask]):
        raise UsageError(
            "Positions that do not count each row's tokens from 0 cannot be had.",
            "Leave position_ids out: the attention mask tells what padding is. It must leave each "
            "row a token to go on from.",
        )
