"""Qwen3-MoE: Qwen3 with many small experts; some blocks may keep a dense feed-forward.

Source: arXiv 2505.09388.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from petalnode.models.config import (
    MAX_BLOCKS,
    MAX_INTERMEDIATE_SIZE,
    MAX_POSITIONS,
    ConfigReader,
    invalid,
)
from petalnode.models.families.family import Family
from petalnode.models.families.llama import SILU, PreNormBlock, llama_client, llama_fields
from petalnode.models.families.mixtral import MixtralConfig, read_experts
from petalnode.models.families.qwen import qwen3_attention
from petalnode.models.layers.mlp import GatedMlp
from petalnode.models.layers.moe import MixtureOfExperts, SoftmaxRouter, gated
from petalnode.models.layers.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096}
"""What a missing key means. A null is another value: no window."""


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(MixtralConfig):
    """A model of Qwen3-MoE's shape; `intermediate_size` is that of the blocks in `dense`."""

    expert_size: int
    renormalise: bool
    dense: frozenset[int]


def read_qwen3_moe(read: ConfigReader) -> Qwen3MoeConfig:
    """Return the configuration of a Qwen3-MoE checkpoint."""
    read = ConfigReader(DEFAULTS | dict(read.config), read.generation)
    read.choice("hidden_act", SILU, default="silu")
    fields = llama_fields(read, "qwen3_moe")
    blocks, windowed = fields["num_blocks"], read.flag("use_sliding_window")
    window = read.optional_size("sliding_window", MAX_POSITIONS) if windowed else None
    return Qwen3MoeConfig(
        **fields,
        **read_experts(read, blocks),
        attention_bias=read.flag("attention_bias"),
        windows=(window,) * blocks,
        expert_size=read.size("moe_intermediate_size", MAX_INTERMEDIATE_SIZE),
        renormalise=read.flag("norm_topk_prob"),
        dense=_dense_blocks(read, blocks),
    )


def _dense_blocks(read: ConfigReader, num_blocks: int) -> frozenset[int]:
    """Return the blocks without experts: those named, and those that the step leaves out."""
    named = read.config.get("mlp_only_layers") or []
    step = read.size("decoder_sparse_step", MAX_BLOCKS, default=1)
    if not isinstance(named, list) or not all(
        type(one) is int and 0 <= one < num_blocks for one in named
    ):
        raise invalid("mlp_only_layers", named, f"a list of blocks below {num_blocks}")
    skipped = (index for index in range(num_blocks) if (index + 1) % step)
    return frozenset(named) | frozenset(skipped)


def qwen3_moe_block(parts: Parts, config: Qwen3MoeConfig, index: int) -> PreNormBlock:
    """Return block `index`."""
    feed_forward: Callable[[Tensor], Tensor] = (
        GatedMlp(parts, config.hidden_size, config.intermediate_size)
        if index in config.dense
        else _experts(parts, config)
    )
    return PreNormBlock(parts, config, qwen3_attention(parts, config, index), feed_forward)


def _experts(parts: Parts, config: Qwen3MoeConfig) -> MixtureOfExperts:
    hidden, wide, experts = config.hidden_size, config.expert_size, config.num_experts
    logits = parts.linear("mlp.gate", experts, hidden, dense=True)
    one = "mlp.experts.{}."
    chosen, renormalise = config.experts_per_token, config.renormalise
    return MixtureOfExperts(
        SoftmaxRouter(logits, chosen, renormalise=renormalise, rounded=True),
        parts.experts((one + "gate_proj", one + "up_proj"), experts, (wide, wide), hidden),
        gated(parts, "silu"),
        parts.experts(one + "down_proj", experts, hidden, wide),
    )


QWEN3_MOE = Family("qwen3_moe", read_qwen3_moe, qwen3_moe_block, llama_client)
