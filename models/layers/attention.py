"""Self-attention as most families have it: fused projections, optional norms of heads and RoPE.

No torch here: the products are the parts', scores and caches the batch's. Suffixes name shapes:
T tokens of the ragged batch, H hidden size, N heads (queries, keys, values side by side), D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    weight and gives no value. `slopes` [query heads], float32: times the distance, added (ALiBi,
    arXiv 2108.12409).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

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
            queries_TND.copy_(self._query_norm(queries_TND))
            keys_TND.copy_(self._key_norm(keys_TND))
        if self._rope is not None:
            batch.rotate_(heads_TND[:, : -self._num_kv_heads], self._rope)
        return self._out(batch.attend(self._index, heads_TND, self._num_kv_heads, self._scores))


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
