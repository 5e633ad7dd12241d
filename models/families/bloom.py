"""BLOOM: ALiBi instead of positions, layer norms (one after the embeddings), a tanh GELU.

Source: arXiv 2211.05100. The same spelling of config.json covers BLOOMZ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from petalnode.models.config import ConfigReader, ModelConfig, common_fields, invalid
from petalnode.models.families.family import Family, SimpleClient
from petalnode.models.layers.attention import Attention, alibi, interleaved_projections
from petalnode.models.layers.mlp import Mlp
from petalnode.models.layers.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.ragged import RaggedBatch


@dataclass(frozen=True, kw_only=True)
class BloomConfig(ModelConfig):
    """A BLOOM. `residual_after_norm`: what a sublayer adds to is its normed input."""

    norm_eps: float
    residual_after_norm: bool


def read_bloom(read: ConfigReader) -> BloomConfig:
    """Return the configuration of a BLOOM checkpoint, by the old names of its keys or the new.

    ALiBi knows no longest text; the context is what the model was trained on.
    """
    if read.flag("slow_but_exact") and read.config.get("pretraining_tp") not in (None, 1):
        raise invalid("slow_but_exact", True, "false: sums in the order of the training machines")
    heads = read.spelling("n_head", "num_attention_heads")
    common = common_fields(
        read,
        "bloom",
        hidden=read.spelling("n_embed", "hidden_size"),
        blocks=read.spelling("n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        positions="seq_length",
        whole_heads=True,
        tied=True,
    )
    return BloomConfig(
        **common,
        norm_eps=read.number("layer_norm_epsilon", 0.0, 1.0, default=1e-5),
        residual_after_norm=read.flag("apply_residual_connection_post_layernorm"),
    )


class BloomBlock:
    """Attention, then feed-forward, each behind its norm. T tokens, H hidden size."""

    def __init__(self, parts: Parts, config: BloomConfig, index: int) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        qkv, out = interleaved_projections(parts, config, bias=True)
        self._attention = Attention(config, index, qkv, out, scores=alibi(parts, config))
        self._attention_norm = parts.layer_norm("input_layernorm", hidden, eps)
        self._feed_forward_norm = parts.layer_norm("post_attention_layernorm", hidden, eps)
        self._feed_forward = Mlp(parts, hidden, 4 * hidden, activation="gelu_tanh")
        self._residual_after_norm = config.residual_after_norm

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the block's output [T, H]; every row's cache is extended, not advanced."""
        normed_TH = self._attention_norm(x_TH)
        residual_TH = normed_TH if self._residual_after_norm else x_TH
        x_TH = residual_TH + self._attention(normed_TH, batch)
        normed_TH = self._feed_forward_norm(x_TH)
        residual_TH = normed_TH if self._residual_after_norm else x_TH
        return residual_TH + self._feed_forward(normed_TH)


class BloomClient(SimpleClient):
    """Embeddings behind a norm of their own, final norm, tied head."""

    def __init__(self, parts: Parts, config: BloomConfig) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        final = parts.layer_norm("transformer.ln_f", hidden, eps)
        super().__init__(parts, config, final, embed="transformer.word_embeddings.weight")
        self._embed_norm = parts.layer_norm("transformer.word_embeddings_layernorm", hidden, eps)

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """See `Client.embed`; positions do not matter here."""
        return self._embed_norm(super().embed(ids_T, positions_T))


BLOOM = Family(
    "bloom",
    read_bloom,
    BloomBlock,
    BloomClient,
    blocks="transformer.h.{}.",
    roots=("transformer.", ""),
    plain_embeddings=False,
)
