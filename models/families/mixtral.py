"""Mixtral: Mistral with a mixture of experts for its feed-forward.

Two of eight experts a token, weighed by their share of the two's probabilities. Source: arXiv
2401.04088. The base of the other families with experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from petalnode.models.config import MAX_EXPERTS, MAX_POSITIONS, ConfigReader, invalid
from petalnode.models.families.family import Family
from petalnode.models.families.llama import SILU, PreNormBlock, llama_client, llama_fields
from petalnode.models.families.mistral import WindowedConfig
from petalnode.models.layers.attention import Attention, Scores, projections
from petalnode.models.layers.moe import MixtureOfExperts, SoftmaxRouter, gated
from petalnode.models.layers.parts import Parts

DEFAULTS = {
    **{"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    **{"num_key_value_heads": 8, "max_position_embeddings": 131072},
}
MAX_EXPERTS_IN_ALL = 1 << 16
"""Over all blocks: each may stand in the files by itself."""


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(WindowedConfig):
    """A model of Mixtral's shape; `intermediate_size` is one expert's."""

    num_experts: int
    experts_per_token: int


def read_experts(read: ConfigReader, num_blocks: int) -> dict[str, Any]:
    """Return how many experts there are in a block, and for each token."""
    key = read.spelling("num_local_experts", "num_experts")
    chosen = read.spelling("num_experts_per_tok", "experts_per_token")
    experts = read.size(key, MAX_EXPERTS)
    if experts * num_blocks > MAX_EXPERTS_IN_ALL:
        wanted = f"at most {MAX_EXPERTS_IN_ALL} over all {num_blocks} blocks"
        raise invalid(key, experts, wanted)
    return {"num_experts": experts, "experts_per_token": read.size(chosen, experts)}


def read_mixtral(read: ConfigReader) -> MixtralConfig:
    """Return the configuration of a Mixtral checkpoint."""
    read = ConfigReader(DEFAULTS | dict(read.config), read.generation)
    read.choice("hidden_act", SILU, default="silu")
    fields = llama_fields(read, "mixtral")
    blocks = fields["num_blocks"]
    windows = (read.optional_size("sliding_window", MAX_POSITIONS),) * blocks
    return MixtralConfig(**fields, **read_experts(read, blocks), windows=windows)


def mixtral_block(parts: Parts, config: MixtralConfig, index: int) -> PreNormBlock:
    """Return block `index`."""
    qkv, out = projections(parts, config)
    scores = Scores(config.head_dim**-0.5, config.windows[index])
    attention = Attention(config, index, qkv, out, rope=config.rope, scores=scores)
    return PreNormBlock(parts, config, attention, _experts(parts, config))


def _experts(parts: Parts, config: MixtralConfig) -> MixtureOfExperts:
    hidden, wide, experts = config.hidden_size, config.intermediate_size, config.num_experts
    logits = parts.linear("block_sparse_moe.gate", experts, hidden, dense=True)
    one = "block_sparse_moe.experts.{}."
    return MixtureOfExperts(
        SoftmaxRouter(logits, config.experts_per_token, renormalise=True, rounded=False),
        parts.experts((one + "w1", one + "w3"), experts, (wide, wide), hidden),
        gated(parts, "silu"),
        parts.experts(one + "w2", experts, hidden, wide),
    )


MIXTRAL = Family("mixtral", read_mixtral, mixtral_block, llama_client)
