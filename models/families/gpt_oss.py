"""gpt-oss: attention with sinks, every other block windowed, and experts in 4-bit floats.

Each head has a sink, a score that takes weight and gives no value. Experts have biases and a
clamped activation; those that the files hold as MXFP4 are expanded while loading. Source: arXiv
2508.10925.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from petalnode.models.config import ConfigReader, invalid
from petalnode.models.families.family import Family
from petalnode.models.families.llama import SILU, PreNormBlock, llama_client, llama_fields
from petalnode.models.families.mistral import read_windows
from petalnode.models.families.mixtral import MixtralConfig, read_experts
from petalnode.models.layers.attention import Attention, Scores, projections
from petalnode.models.layers.moe import MixtureOfExperts, TopRouter, clamped_swiglu
from petalnode.models.layers.parts import MXFP4_GROUP, Parts

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
DEFAULTS: dict[str, Any] = {"rope_theta": 150000.0, "rms_norm_eps": 1e-5, "head_dim": 64}
DEFAULTS |= {"attention_bias": True, "sliding_window": 128}
DEFAULTS |= {"num_key_value_heads": 8, "max_position_embeddings": 131072}
MAX_LIMIT = 1e6


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(MixtralConfig):
    """A model of gpt-oss's shape; `limit` clamps the experts' inner numbers."""

    limit: float
    mxfp4: bool


def read_gpt_oss(read: ConfigReader) -> GptOssConfig:
    """Return the configuration of a gpt-oss checkpoint."""
    mxfp4 = read.quantization(GPT_OSS.quantized) is not None
    config = DEFAULTS | ({"torch_dtype": "bfloat16"} if mxfp4 else {}) | dict(read.config)
    if not config.get("rope_scaling") and config.get("rope_parameters") is None:
        config["rope_parameters"] = YARN
    read = ConfigReader(config, read.generation)
    read.choice("hidden_act", SILU, default="silu")
    fields = llama_fields(read, "gpt_oss")
    for key in ("hidden_size", "intermediate_size"):
        if mxfp4 and fields[key] % MXFP4_GROUP:
            raise invalid(key, fields[key], f"a multiple of {MXFP4_GROUP}, as MXFP4 has it")
    return GptOssConfig(
        **fields,
        **read_experts(read, fields["num_blocks"]),
        attention_bias=read.flag("attention_bias"),
        windows=read_windows(read, fields["num_blocks"], lambda index: index % 2 == 0),
        limit=read.number("swiglu_limit", 0.0, MAX_LIMIT, default=7.0),
        mxfp4=mxfp4,
    )


def gpt_oss_block(parts: Parts, config: GptOssConfig, index: int) -> PreNormBlock:
    """Return block `index`."""
    qkv, out = projections(parts, config, bias=config.attention_bias)
    scores = Scores(
        config.head_dim**-0.5,
        config.windows[index],
        sinks=parts.vector("self_attn.sinks", config.num_heads),
    )
    attention = Attention(config, index, qkv, out, rope=config.rope, scores=scores)
    return PreNormBlock(parts, config, attention, _experts(parts, config))


def _experts(parts: Parts, config: GptOssConfig) -> MixtureOfExperts:
    hidden, wide, experts = config.hidden_size, config.intermediate_size, config.num_experts
    logits = parts.linear("mlp.router", experts, hidden, bias=True, dense=True)
    name, mxfp4 = "mlp.experts.", config.mxfp4
    return MixtureOfExperts(
        TopRouter(logits, config.experts_per_token),
        parts.stacked_experts(
            name + "gate_up_proj", experts, 2 * wide, hidden, row_order=_apart(wide), mxfp4=mxfp4
        ),
        clamped_swiglu(config.limit),
        parts.stacked_experts(name + "down_proj", experts, hidden, wide, mxfp4=mxfp4),
    )


@cache
def _apart(wide: int) -> tuple[int, ...]:
    """Return the rows of gate, then those of up, which alternate in the files."""
    return (*range(0, 2 * wide, 2), *range(1, 2 * wide, 2))


GPT_OSS = Family("gpt_oss", read_gpt_oss, gpt_oss_block, llama_client, quantized=("mxfp4",))
