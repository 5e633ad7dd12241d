"""Causal attention of a ragged batch: one row's new tokens over that row's own cache.

Linear layers see all T tokens of the batch at once; here each row is on its own, because rows
differ in length and nothing is padded. Key and value heads are never copied out to the number of
query heads: the queries that share a key head go through one product with it.

Suffixes name shapes: T tokens of the batch, n tokens of one row, L tokens that they see, K key
(and value) heads, G query heads for each of them, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.models.kv_cache import RowCache
from petalnode.models.layers.attention import Scores
from petalnode.models.layers.rope import angles, inverse_frequencies, rotate_
from petalnode.models.rope_config import RopeConfig
from petalnode.models.tuning.tuning import Tuning


class Keys(Protocol):
    """Where a row's keys and values lie: a `RowCache`, or nowhere but in the batch."""

    def extend(self, block: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values [2, K, n, D]; return all keys and all values, each [K, L, D]."""


class NoKeys:
    """For rows that are whole, as in training: what they see is all in the batch."""

    def extend(self, block: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new keys and values: there are no others."""
        keys, values = new.unbind(0)
        return keys, values


class Row(Protocol):
    """What attention asks of a row's part in a batch."""

    @property
    def cache(self) -> Keys:
        """Where its keys and values go."""

    @property
    def position(self) -> int:
        """The position of its first token in the batch."""

    @property
    def n(self) -> int:
        """Its tokens in the batch."""


@dataclass(frozen=True)
class RowSlice:
    """The next `n` tokens of one row: they take the positions [position, position + n).

    `tuning`: what the row's client adds to the blocks, on the span's device.
    """

    cache: RowCache
    position: int
    n: int
    tuning: Tuning | None = None


@dataclass(frozen=True)
class WholeRow:
    """A row of `n` tokens from position 0 on, for one pass that leaves nothing behind."""

    n: int
    tuning: Tuning | None = None
    position: int = 0
    cache: NoKeys = field(default_factory=NoKeys)


class RaggedBatch:
    """What all blocks of one forward pass share: the rows, their angles and their masks."""

    def __init__(self, rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self._lengths = rows, [row.n for row in rows]
        self._dtype, self._device = dtype, device
        self._angles: dict[RopeConfig, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        # Small products beat the fused kernel on short queries, but round scores to the dtype.
        self._decode_only = dtype == torch.float32 and all(row.n == 1 for row in rows)

    def rotate_(self, heads: Tensor, rope: RopeConfig) -> None:
        """Rotate heads [T, heads, D] in place by the tokens' positions."""
        if rope not in self._angles:
            pieces = [torch.arange(row.position, row.position + row.n) for row in self.rows]
            positions = torch.cat(pieces).to(self._device)
            inverse, scale = _inverse(rope, self._device), rope.attention_factor
            self._angles[rope] = angles(positions, inverse, self._dtype, scale)
        cos, sin = self._angles[rope]
        rotate_(heads if heads.shape[-1] == rope.dim else heads[..., : rope.dim], cos, sin)

    def attend(self, block: int, heads: Tensor, num_kv_heads: int, scores: Scores) -> Tensor:
        """Append keys and values of `block` to every row's cache, and attend over it.

        `heads` is [T, K*G + 2*K, D]: rotated queries and keys, then values. Returns [T, K*G*D].
        """
        tokens, all_heads, size = heads.shape
        queries = all_heads - 2 * num_kv_heads
        q_TKGD = heads[:, :queries].view(tokens, num_kv_heads, -1, size)
        kv_T2KD = heads[:, queries:].view(tokens, 2, num_kv_heads, -1)
        if self._decode_only and scores.plain:
            return self._decode(block, q_TKGD, kv_T2KD, scores).view(tokens, -1)
        out: list[Tensor] = []
        # Cut at once: the gradient of each slice by itself would be of the whole batch's size.
        cut = zip(
            self.rows,
            torch.split(q_TKGD, self._lengths),
            torch.split(kv_T2KD, self._lengths),
            strict=True,
        )
        for at, (row, q_nKGD, kv_n2KD) in enumerate(cut):
            new = kv_n2KD.permute(1, 2, 0, 3)
            k_KLD, v_KLD = _seen(row, scores.window, *row.cache.extend(block, new))
            if not scores.plain:
                out.append(_attend_by_parts(q_nKGD, k_KLD, v_KLD, row, scores))
            elif row.n == 1:
                out.append(_attend_one(q_nKGD, k_KLD, v_KLD, scores.scale))
            else:
                mask = self._mask(at, scores.window)
                out.append(_attend_many(q_nKGD, k_KLD, v_KLD, mask, scores.scale))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _decode(self, block: int, q_TKGD: Tensor, kv_T2KD: Tensor, scores: Scores) -> Tensor:
        """Attend with one token a row, in as few operations a row as can be."""
        q_TKGD = q_TKGD * scores.scale
        out = []
        for row, q_KGD, new in zip(
            self.rows, q_TKGD.unbind(0), kv_T2KD.unsqueeze(3).unbind(0), strict=True
        ):
            k_KLD, v_KLD = _seen(row, scores.window, *row.cache.extend(block, new))
            weights = torch.softmax(torch.bmm(q_KGD, k_KLD.mT), -1)
            out.append(torch.bmm(weights, v_KLD))
        return out[0] if len(out) == 1 else torch.stack(out)

    def _mask(self, at: int, window: int | None) -> Tensor | None:
        """Return what is added to the scores [n, L] of a row, or None where `is_causal` does it."""
        key = (at, window)
        if key not in self._masks:
            row = self.rows[at]
            plain = row.position == 0 and (window is None or row.n <= window)
            ahead = None if plain else _distances(row, window, self._device)
            self._masks[key] = None if ahead is None else _mask(ahead, window, self._dtype)
        return self._masks[key]


@cache
def _inverse(rope: RopeConfig, device: torch.device) -> Tensor:
    return inverse_frequencies(rope).to(device)


def _seen(row: Row, window: int | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values that any of a row's new tokens can see."""
    if window is None or row.position < window:
        return keys, values
    begin = row.position - window + 1
    return keys[:, begin:], values[:, begin:]


def _distances(row: Row, window: int | None, device: torch.device) -> Tensor:
    """Return how far each key that is seen lies before each new token: [n, L], negative ahead."""
    end = row.position + row.n
    begin = 0 if window is None or row.position < window else row.position - window + 1
    positions = torch.arange(begin, end, device=device)
    return positions[-row.n :, None] - positions


def _mask(distances: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    hidden = distances < 0
    if window is not None:
        hidden |= distances >= window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, float("-inf")
    )


def _attend_one(q_nKGD: Tensor, k_KLD: Tensor, v_KLD: Tensor, scale: float) -> Tensor:
    """Attend with one token; the G queries of a key head stand in for query positions."""
    attended = F.scaled_dot_product_attention(
        q_nKGD, k_KLD.unsqueeze(0), v_KLD.unsqueeze(0), scale=scale
    )
    return attended.reshape(1, -1)


def _attend_many(
    q_nKGD: Tensor, k_KLD: Tensor, v_KLD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend with n tokens, the last n of L; without a mask they are all there is."""
    attended = F.scaled_dot_product_attention(
        q_nKGD.flatten(1, 2).transpose(0, 1).unsqueeze(0),
        k_KLD.unsqueeze(0),
        v_KLD.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_nKGD.shape[2] > 1,
    )
    return attended.squeeze(0).transpose(0, 1).reshape(len(q_nKGD), -1)


def _attend_by_parts(
    q_nKGD: Tensor, k_KLD: Tensor, v_KLD: Tensor, row: Row, scores: Scores
) -> Tensor:
    """Attend where scores are capped, sloped or compete with sinks; softmax in float32."""
    n, heads_k, heads_g, size = q_nKGD.shape
    distances_nL = _distances(row, scores.window, q_nKGD.device)
    queries = q_nKGD.permute(1, 2, 0, 3).reshape(heads_k, -1, size)
    s_KGnL = (queries @ k_KLD.mT).view(heads_k, heads_g, n, -1).float().mul_(scores.scale)
    if scores.softcap is not None:
        s_KGnL = torch.tanh(s_KGnL / scores.softcap) * scores.softcap
    if scores.slopes is not None:
        s_KGnL.add_(_alibi(scores, heads_k, distances_nL[-1], row))
    if n > 1:  # one token sees all keys that are left
        s_KGnL.add_(_mask(distances_nL, scores.window, torch.float32))
    if scores.sinks is not None:
        sinks = scores.sinks.float().view(heads_k, heads_g, 1, 1).expand(-1, -1, n, 1)
        s_KGnL = torch.cat((s_KGnL, sinks), -1)
    weights_KGnL = torch.softmax(s_KGnL, -1)[..., : k_KLD.shape[1]].to(v_KLD.dtype)
    attended = (weights_KGnL.flatten(1, 2) @ v_KLD).view(heads_k, heads_g, n, size)
    return attended.permute(2, 0, 1, 3).reshape(n, -1)


def _alibi(scores: Scores, heads_k: int, distances_L: Tensor, row: Row) -> Tensor:
    """Return what ALiBi adds to the scores: [K, G, 1, L], by the distances from the last new token.

    For the other tokens that is off by the same number for all keys, which softmax does not see.
    """
    assert scores.slopes is not None
    slopes_KG11 = scores.slopes.view(heads_k, -1, 1, 1)
    if not scores.coarse:
        return slopes_KG11 * -distances_L
    positions_L = row.position + row.n - 1 - distances_L
    return (slopes_KG11.bfloat16() * positions_L.bfloat16()).float() * scores.scale
