"""Falcon: attention and feed-forward side by side (7B), the new decoder (11B, 40B, 180B), and RW.

The new decoder groups its query heads and may norm the two branches apart; RW models are
sequential, with biases and ALiBi, whose numbers are those of their training in bfloat16, in every
dtype. Source: arXiv 2311.16867.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from petalnode.models.config import (
    MAX_HEADS,
    MAX_INTERMEDIATE_SIZE,
    ConfigReader,
    ModelConfig,
    common_fields,
    invalid,
)
from petalnode.models.families.family import Family, SimpleClient
from petalnode.models.layers.attention import Attention, alibi, interleaved_projections
from petalnode.models.layers.mlp import Mlp
from petalnode.models.layers.parts import Parts
from petalnode.models.rope_config import RopeConfig, read_rope

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.ragged import RaggedBatch


@dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """A Falcon. Without `rope` it has ALiBi; `two_norms`: one for each of the parallel branches."""

    intermediate_size: int
    norm_eps: float
    activation: str
    rope: RopeConfig | None
    bias: bool
    parallel: bool
    two_norms: bool


def read_falcon(read: ConfigReader) -> FalconConfig:
    """Return the configuration of a Falcon checkpoint (of `model_type` falcon, not RefinedWeb)."""
    kv_heads = "num_attention_heads"
    common = common_fields(read, "falcon", kv_heads=kv_heads, whole_heads=True, tied=True)
    new, parallel = read.flag("new_decoder_architecture"), read.flag("parallel_attn", True)
    if new and not parallel:
        raise invalid("parallel_attn", parallel, "true in the new decoder architecture")
    norms = read.size("num_ln_in_parallel_attn", 2, default=2 if new else 1)
    if norms == 2 and not new:
        raise invalid("num_ln_in_parallel_attn", 2, "1 outside the new decoder architecture")
    common["num_kv_heads"] = _kv_heads(read, common["num_heads"], new)
    hidden = common["hidden_size"]
    return FalconConfig(
        **common,
        intermediate_size=read.size("ffn_hidden_size", MAX_INTERMEDIATE_SIZE, 4 * hidden),
        norm_eps=read.number("layer_norm_epsilon", 0.0, 1.0, default=1e-5),
        activation=read.activation("activation", "gelu"),
        rope=None if read.flag("alibi") else read_rope(read.config, common["head_dim"]),
        bias=read.flag("bias"),
        parallel=parallel,
        two_norms=norms == 2,
    )


def _kv_heads(read: ConfigReader, num_heads: int, new: bool) -> int:
    if not new and read.flag("multi_query", True):
        return 1
    kv_heads = read.size("num_kv_heads", MAX_HEADS, default=num_heads)
    if num_heads % kv_heads or not (new or kv_heads == num_heads):
        wanted = f"a divisor of the {num_heads} heads" if new else f"{num_heads} or missing"
        raise invalid("num_kv_heads", kv_heads, wanted)
    return kv_heads


class FalconBlock:
    """Attention and feed-forward, side by side or one after the other. T tokens, H hidden size."""

    def __init__(self, parts: Parts, config: FalconConfig, index: int) -> None:
        hidden, bias = config.hidden_size, config.bias
        qkv, out = interleaved_projections(parts, config, bias=bias)
        scores = alibi(parts, config, coarse=True) if config.rope is None else None
        self._attention = Attention(config, index, qkv, out, rope=config.rope, scores=scores)
        self._feed_forward = Mlp(
            parts, hidden, config.intermediate_size, activation=config.activation, bias=bias
        )
        first, second = ("ln_attn", "ln_mlp") if config.two_norms else ("input_layernorm", None)
        if not config.parallel:
            second = "post_attention_layernorm"
        eps, self._parallel = config.norm_eps, config.parallel
        self._norm = parts.layer_norm(first, hidden, eps)
        self._second_norm = None if second is None else parts.layer_norm(second, hidden, eps)

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the block's output [T, H]; every row's cache is extended, not advanced."""
        normed_TH = self._norm(x_TH)
        attended_TH = x_TH + self._attention(normed_TH, batch)
        if self._second_norm is not None:
            normed_TH = self._second_norm(x_TH if self._parallel else attended_TH)
        return attended_TH + self._feed_forward(normed_TH)


def falcon_client(parts: Parts, config: FalconConfig) -> SimpleClient:
    """Return embeddings, final norm and head."""
    norm = parts.layer_norm("transformer.ln_f", config.hidden_size, config.norm_eps)
    return SimpleClient(parts, config, norm, embed="transformer.word_embeddings.weight")


FALCON = Family(
    "falcon",
    read_falcon,
    FalconBlock,
    falcon_client,
    blocks="transformer.h.{}.",
    roots=("transformer.", ""),
)
