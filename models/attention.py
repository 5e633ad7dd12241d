"""Causal attention of a ragged batch: one row's new tokens over that row's own cache.

Linear layers see all T tokens of the batch at once; here each row is on its own, because rows
differ in length and nothing is padded. Key and value heads are never copied out to the number of
query heads: the queries that share a key head go through one product with it.

Suffixes name shapes: T tokens of the batch, n tokens of one row, L tokens in a row's cache, K key
(and value) heads, G query heads for each of them, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.models.kv_cache import RowCache


@dataclass(frozen=True)
class RowSlice:
    """The next `n` tokens of one row: they take the positions [position, position + n)."""

    cache: RowCache
    position: int
    n: int


class RaggedBatch:
    """What all blocks of one forward pass share: the rows, their angles and their masks.

    `cos` and `sin` are [T, 1, D], see `petalnode.models.rope.angles`.
    """

    def __init__(self, rows: Sequence[RowSlice], cos: Tensor, sin: Tensor) -> None:
        self.rows = rows
        self.cos, self.sin = cos, sin
        self._masks = [_mask(row, cos) for row in rows]
        # Small products beat the fused kernel on short queries, but round scores to the dtype.
        self._decode_only = cos.dtype == torch.float32 and all(row.n == 1 for row in rows)

    def attend(self, block: int, heads: Tensor, num_kv_heads: int) -> Tensor:
        """Append keys and values of `block` to every row's cache, and attend over it.

        `heads` is [T, K*G + 2*K, D]: rotated queries and keys, then values. Returns [T, K*G*D].
        """
        tokens, all_heads, size = heads.shape
        queries = all_heads - 2 * num_kv_heads
        q_TKGD = heads[:, :queries].view(tokens, num_kv_heads, -1, size)
        kv_T2KD = heads[:, queries:].view(tokens, 2, num_kv_heads, size)
        if self._decode_only:
            return self._decode(block, q_TKGD, kv_T2KD).view(tokens, -1)
        out: list[Tensor] = []
        begin = 0
        for row, mask in zip(self.rows, self._masks, strict=True):
            new = kv_T2KD[begin : begin + row.n].permute(1, 2, 0, 3)
            keys, values = row.cache.extend(block, new)
            attend = _attend_one if row.n == 1 else _attend_many
            out.append(attend(q_TKGD[begin : begin + row.n], keys, values, mask))
            begin += row.n
        return out[0] if len(out) == 1 else torch.cat(out)

    def _decode(self, block: int, q_TKGD: Tensor, kv_T2KD: Tensor) -> Tensor:
        """Attend with one token a row, in as few operations a row as can be."""
        q_TKGD = q_TKGD * q_TKGD.shape[-1] ** -0.5
        out = []
        for row, q_KGD, new in zip(
            self.rows, q_TKGD.unbind(0), kv_T2KD.unsqueeze(3).unbind(0), strict=True
        ):
            k_KLD, v_KLD = row.cache.extend(block, new)
            weights = torch.softmax(torch.bmm(q_KGD, k_KLD.mT), -1)
            out.append(torch.bmm(weights, v_KLD))
        return out[0] if len(out) == 1 else torch.stack(out)


def _mask(row: RowSlice, like: Tensor) -> Tensor | None:
    """Return what is added to the scores [n, L], or None where `is_causal` or nothing does."""
    if row.n == 1 or row.position == 0:
        return None
    length = row.position + row.n
    mask = torch.full((row.n, length), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(row.position + 1)


def _attend_one(q_nKGD: Tensor, k_KLD: Tensor, v_KLD: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with one token; the G queries of a key head stand in for query positions."""
    attended = F.scaled_dot_product_attention(q_nKGD, k_KLD.unsqueeze(0), v_KLD.unsqueeze(0))
    return attended.view(1, -1)


def _attend_many(q_nKGD: Tensor, k_KLD: Tensor, v_KLD: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with n tokens, the last n of L; without a mask they are all there is."""
    attended = F.scaled_dot_product_attention(
        q_nKGD.flatten(1, 2).transpose(0, 1).unsqueeze(0),
        k_KLD.unsqueeze(0),
        v_KLD.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_nKGD.shape[2] > 1,
    )
    return attended.squeeze(0).transpose(0, 1).reshape(len(q_nKGD), -1)
