"""Phi-3 to Phi-4: a Llama with fused matrices, windows, part of each head rotated, and LongRoPE.

Sources: arXiv 2404.14219, 2503.01743. LongRoPE divides the frequencies by one list of factors in
texts up to the original context, by another in longer ones: with the token that crosses it, all
keys of the text change, also those in every cache. petalnode runs such a model with the first list
and up to the original context (4096 tokens of Phi-3-mini-128k and Phi-4-mini).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petalnode.models.config import (
    MAX_INTERMEDIATE_SIZE,
    MAX_POSITIONS,
    ConfigReader,
    common_fields,
    invalid,
)
from petalnode.models.families.family import Family
from petalnode.models.families.llama import SILU, LlamaConfig, PreNormBlock, llama_client
from petalnode.models.layers.attention import Attention, Scores
from petalnode.models.layers.mlp import GatedMlp
from petalnode.models.layers.parts import Parts
from petalnode.models.rope_config import RopeConfig, read_rope

OTHER_NAMES = ("su", "yarn")
"""What Phi-3's configurations called LongRoPE before."""


@dataclass(frozen=True, kw_only=True)
class Phi3Config(LlamaConfig):
    """A Phi-3. `window`: how many tokens each token sees, itself included; None: all."""

    window: int | None


def read_phi3(read: ConfigReader) -> Phi3Config:
    """Return the configuration of a checkpoint of Phi-3, 3.5 or 4 (the dense text models)."""
    read = ConfigReader({"max_position_embeddings": 4096} | dict(read.config), read.generation)
    read.choice("hidden_act", SILU, default="silu")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        if read.flag(key):
            raise invalid(key, True, "false, as in every Phi-3")
    common = common_fields(read, "phi3")
    rope = _rope(read, common["head_dim"])
    if rope.kind == "longrope":
        common["max_positions"] = min(common["max_positions"], rope.original_max_positions)
    return Phi3Config(
        **common,
        intermediate_size=read.size("intermediate_size", MAX_INTERMEDIATE_SIZE),
        norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-5),
        rope=rope,
        window=read.optional_size("sliding_window", MAX_POSITIONS),
    )


def _rope(read: ConfigReader, head_dim: int) -> RopeConfig:
    """Phi-3's own spelling: the original context stands outside of the rotary parameters."""
    config: dict[str, Any] = dict(read.config)
    original = read.size("original_max_position_embeddings", MAX_POSITIONS, default=4096)
    config["original_max_position_embeddings"] = original
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if not isinstance(scaling, Mapping):
            continue
        if scaling.get("rope_type", scaling.get("type")) in OTHER_NAMES:
            config[key] = dict(scaling, rope_type="longrope")
    return read_rope(config, head_dim, kinds=("default", "longrope"), partial=True)


def phi3_block(parts: Parts, config: Phi3Config, index: int) -> PreNormBlock:
    """Return block `index`."""
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    total = queries + 2 * config.num_kv_heads * config.head_dim
    attention = Attention(
        config,
        index,
        parts.linear("self_attn.qkv_proj", total, hidden),
        parts.linear("self_attn.o_proj", hidden, queries),
        rope=config.rope,
        scores=Scores(config.head_dim**-0.5, window=config.window),
    )
    wide, fused = config.intermediate_size, "mlp.gate_up_proj"
    return PreNormBlock(parts, config, attention, GatedMlp(parts, hidden, wide, gate_up=fused))


PHI3 = Family("phi3", read_phi3, phi3_block, llama_client)
