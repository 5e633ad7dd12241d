"""Llama 1 to 3.x: pre-norm attention with rotary embeddings, then a gated feed-forward.

Grouped-query attention, scaled rotary embeddings, optional biases. Sources: arXiv 2302.13971,
2307.09288, 2407.21783. The base of the many families that differ from it in a detail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petalnode.models.config import (
    MAX_INTERMEDIATE_SIZE,
    ConfigReader,
    ModelConfig,
    common_fields,
)
from petalnode.models.families.family import Family, SimpleClient
from petalnode.models.layers.attention import Attention, projections
from petalnode.models.layers.mlp import GatedMlp
from petalnode.models.layers.parts import Parts
from petalnode.models.rope_config import RopeConfig, read_rope

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.ragged import RaggedBatch

SILU = ("silu", "swish")
"""What the configurations call it."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A model of Llama's shape."""

    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    attention_bias: bool = False
    mlp_bias: bool = False


def read_llama(read: ConfigReader) -> LlamaConfig:
    """Return the configuration of a Llama checkpoint."""
    read.choice("hidden_act", SILU, default="silu")
    return LlamaConfig(
        **llama_fields(read, "llama"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
    )


def llama_fields(read: ConfigReader, family: str, **keys: Any) -> dict[str, Any]:
    """Return the fields of `LlamaConfig` but its biases; `keys` are those of `common_fields`."""
    common = common_fields(read, family, **keys)
    return common | {
        "intermediate_size": read.size("intermediate_size", MAX_INTERMEDIATE_SIZE),
        "norm_eps": read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        "rope": read_rope(read.config, common["head_dim"]),
    }


class PreNormBlock:
    """x + attention(norm(x)), then x + feed_forward(norm(x)). T tokens, H hidden size."""

    def __init__(
        self,
        parts: Parts,
        config: LlamaConfig,
        attention: Attention,
        feed_forward: Callable[[Tensor], Tensor],
    ) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self._attention_norm = parts.rms_norm("input_layernorm", hidden, eps)
        self._feed_forward_norm = parts.rms_norm("post_attention_layernorm", hidden, eps)
        self._attention, self._feed_forward = attention, feed_forward

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the block's output [T, H]; every row's cache is extended, not advanced."""
        x_TH = x_TH + self._attention(self._attention_norm(x_TH), batch)
        return x_TH + self._feed_forward(self._feed_forward_norm(x_TH))


def llama_block(parts: Parts, config: LlamaConfig, index: int) -> PreNormBlock:
    """Return block `index`."""
    qkv, out = projections(parts, config, bias=config.attention_bias)
    attention = Attention(config, index, qkv, out, rope=config.rope)
    hidden, wide = config.hidden_size, config.intermediate_size
    return PreNormBlock(
        parts, config, attention, GatedMlp(parts, hidden, wide, bias=config.mlp_bias)
    )


def llama_client(parts: Parts, config: LlamaConfig) -> SimpleClient:
    """Return embeddings, final norm and head."""
    norm = parts.rms_norm("model.norm", config.hidden_size, config.norm_eps)
    return SimpleClient(parts, config, norm)


LLAMA = Family("llama", read_llama, llama_block, llama_client)
