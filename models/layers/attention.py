"""Self-attention as most families have it: fused projections, optional norms of heads and RoPE.

No torch here: the products are the parts', scores and caches the batch's. Suffixes name shapes:
T tokens of the ragged batch, H hidden size, N heads (queries, keys, values side by side), D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from petalnode.models.config import ModelConfig
from petalnode.models.layers.parts import Parts
from petalnode.models.rope_config import RopeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.parts import Layer
    from petalnode.models.layers.ragged import RaggedBatch

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, eq=False)
class Scores:
    """How the products of queries and keys become weights.

    `scale` multiplies them. `window`: a token sees only that many keys, itself included. `softcap`:
    scores become softcap * tanh(score / softcap). `sinks` [query heads]: one more score that takes
    weight and gives no value. `slopes` [query heads], float32: times the distance, subtracted
    (ALiBi, arXiv 2108.12409). `coarse`: instead, their product with the key's position is added
    before the scale, all in bfloat16.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    coarse: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing but the scale applies, apart from the window."""
        return self.softcap is None and self.sinks is None and self.slopes is None


class Attention:
    """Projections, heads, scores, output: [T, H] to [T, H].

    `qkv` gives the query heads, the key heads, the value heads, in this order, side by side.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        qkv: Layer,
        out: Layer,
        *,
        rope: RopeConfig | None = None,
        scores: Scores | None = None,
        query_norm: Layer | None = None,
        key_norm: Layer | None = None,
    ) -> None:
        self._index, self._qkv, self._out, self._rope = index, qkv, out, rope
        self._scores = scores or Scores(config.head_dim**-0.5)
        self._head_dim, self._num_kv_heads = config.head_dim, config.num_kv_heads
        self._query_norm, self._key_norm = query_norm, key_norm

    def __call__(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Attend; every row's cache of this block is extended, not advanced."""
        heads_TND = self._qkv(x_TH).view(len(x_TH), -1, self._head_dim)
        if self._query_norm is not None and self._key_norm is not None:
            queries_TND = heads_TND[:, : -2 * self._num_kv_heads]
            keys_TND = heads_TND[:, -2 * self._num_kv_heads : -self._num_kv_heads]
            queries_TND.copy_(self._query_norm(_kept(queries_TND)))
            keys_TND.copy_(self._key_norm(_kept(keys_TND)))
        if self._rope is not None:
            batch.rotate_(heads_TND[:, : -self._num_kv_heads], self._rope)
        return self._out(batch.attend(self._index, heads_TND, self._num_kv_heads, self._scores))


def _kept(heads: Tensor) -> Tensor:
    """Return heads that are about to be overwritten, or a copy where a gradient needs them."""
    return heads.clone() if heads.requires_grad else heads


def projections(
    parts: Parts,
    config: ModelConfig,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    names: Sequence[str] = QKV,
    out: str = "self_attn.o_proj",
) -> tuple[Layer, Layer]:
    """Return the layers `qkv` and `out` of a checkpoint that stores queries, keys, values apart."""
    queries, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    return (
        parts.linear(names, (queries, kv, kv), hidden, bias=bias),
        parts.linear(out, hidden, queries, bias=bias if out_bias is None else out_bias),
    )


def interleaved_projections(
    parts: Parts,
    config: ModelConfig,
    *,
    bias: bool,
    name: str = "self_attention.query_key_value",
    out: str = "self_attention.dense",
) -> tuple[Layer, Layer]:
    """Return the layers `qkv` and `out` of a checkpoint that goes key head by key head.

    One matrix holds the query heads of the first key head, that key, its value, and so on. Its rows
    are put into the order of `Attention` while they are loaded.
    """
    order = _rows_apart(config.num_heads, config.num_kv_heads, config.head_dim)
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    return (
        parts.linear(name, len(order), hidden, bias=bias, row_order=order),
        parts.linear(out, hidden, queries, bias=bias),
    )


@cache
def _rows_apart(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    group = num_heads // num_kv_heads + 2
    heads = list(range(num_heads + 2 * num_kv_heads))
    keys, values = heads[group - 2 :: group], heads[group - 1 :: group]
    queries = [head for head in heads if head % group < group - 2]
    return tuple(
        head * head_dim + at for head in (*queries, *keys, *values) for at in range(head_dim)
    )


def alibi(parts: Parts, config: ModelConfig, *, coarse: bool = False) -> Scores:
    """Return scores with ALiBi; see `Scores`."""
    slopes = parts.constant(alibi_slopes(config.num_heads))
    return Scores(config.head_dim**-0.5, slopes=slopes, coarse=coarse)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return each head's slope (arXiv 2108.12409): powers of 2**(-8 / n).

    n is the power of two at or below the number of heads; heads beyond it have the odd powers of
    the root of that base.
    """
    n = 1 << (num_heads.bit_length() - 1)
    beyond = num_heads - n
    return [2 ** (-8 * (i + 1) / n) for i in range(n)] + [
        2 ** (-4 * (2 * i + 1) / n) for i in range(beyond)
    ]
