"""Gemma 2 (arXiv 2408.00118): norms before and after each part, a window in every other block.

Norms whose weights lack one, embeddings times the root of the hidden size, capped scores and
logits. The base of Gemma 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petalnode.models.config import MAX_BLOCKS, ConfigReader, invalid
from petalnode.models.families.family import Family, SimpleClient
from petalnode.models.families.llama import llama_fields
from petalnode.models.families.mistral import WindowedConfig, read_windows
from petalnode.models.layers.attention import Attention, Scores, projections
from petalnode.models.layers.mlp import GatedMlp
from petalnode.models.layers.parts import Parts
from petalnode.models.rope_config import RopeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.ragged import RaggedBatch

MAX_SCALAR = 1e6
SHARED_DEFAULTS: dict[str, Any] = {
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    **{"bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True},
    **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    "sliding_window": 4096,
}
"""What a missing key means. A null is another value."""
DEFAULTS = SHARED_DEFAULTS | {
    **{"vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window_pattern": 2},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(WindowedConfig):
    """A Gemma. Blocks with a window turn heads by `local_rope`, the others by `rope`.

    Scores are divided by the root of `query_scalar`. A softcap c makes c * tanh(x / c) of x.
    """

    activation: str
    query_scalar: float
    score_softcap: float | None
    logit_softcap: float | None
    local_rope: RopeConfig


def read_gemma2(read: ConfigReader) -> GemmaConfig:
    """Return the configuration of a Gemma 2 checkpoint."""
    read = ConfigReader(DEFAULTS | dict(read.config), read.generation)
    fields = gemma_fields(read, "gemma2")
    pattern = read.config["sliding_window_pattern"]
    if pattern != 2:
        raise invalid("sliding_window_pattern", pattern, "2, as in every Gemma 2")
    softcap = read.optional_number("attn_logit_softcapping", 0.0, MAX_SCALAR)
    return GemmaConfig(**fields, local_rope=fields["rope"], score_softcap=softcap)


def gemma_fields(read: ConfigReader, family: str) -> dict[str, Any]:
    """Return the fields of `GemmaConfig` but `local_rope` and `score_softcap`."""
    if read.flag("use_bidirectional_attention"):
        raise invalid("use_bidirectional_attention", True, "false for a model that writes text")
    fields = llama_fields(read, family)
    pattern = read.size("sliding_window_pattern", MAX_BLOCKS)
    return fields | {
        "windows": read_windows(read, fields["num_blocks"], lambda at: (at + 1) % pattern != 0),
        "attention_bias": read.flag("attention_bias"),
        "activation": read.activation(read.spelling("hidden_activation", "hidden_act")),
        "query_scalar": read.number("query_pre_attn_scalar", 0.0, MAX_SCALAR),
        "logit_softcap": read.optional_number("final_logit_softcapping", 0.0, MAX_SCALAR),
    }


class SandwichBlock:
    """x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x)))."""

    def __init__(self, parts: Parts, config: GemmaConfig, attention: Attention) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self._norms = [
            parts.rms_norm(f"{name}_layernorm", hidden, eps, plus_one=True) for name in names
        ]
        wide, activation = config.intermediate_size, config.activation
        self._attention = attention
        self._feed_forward = GatedMlp(parts, hidden, wide, activation=activation)

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the block's output [T, H]; every row's cache is extended, not advanced."""
        before, after, before_wide, after_wide = self._norms
        x_TH = x_TH + after(self._attention(before(x_TH), batch))
        return x_TH + after_wide(self._feed_forward(before_wide(x_TH)))


def gemma2_block(parts: Parts, config: GemmaConfig, index: int) -> SandwichBlock:
    """Return block `index` of a Gemma 2."""
    qkv, out = projections(parts, config, bias=config.attention_bias)
    attention = Attention(
        config, index, qkv, out, rope=config.rope, scores=gemma_scores(config, index)
    )
    return SandwichBlock(parts, config, attention)


def gemma_scores(config: GemmaConfig, index: int) -> Scores:
    """Return how block `index` weighs keys."""
    return Scores(config.query_scalar**-0.5, config.windows[index], config.score_softcap)


def gemma_client(parts: Parts, config: GemmaConfig) -> SimpleClient:
    """Return scaled embeddings, final norm and a head with capped logits."""
    norm = parts.rms_norm("model.norm", config.hidden_size, config.norm_eps, plus_one=True)
    scale, softcap = config.hidden_size**0.5, config.logit_softcap
    return SimpleClient(parts, config, norm, scale=scale, softcap=softcap)


GEMMA2 = Family("gemma2", read_gemma2, gemma2_block, gemma_client)
