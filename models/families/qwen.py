"""Qwen2 (arXiv 2407.10671, and 2.5) and Qwen3 (2505.09388): Llama's blocks, some with a window.

Qwen2 has biases for queries, keys and values; Qwen3 norms each head of queries and keys instead.
"""

from __future__ import annotations

from typing import Any

from petalnode.models.config import MAX_BLOCKS, ConfigReader
from petalnode.models.families.family import Family
from petalnode.models.families.llama import SILU, PreNormBlock, llama_client, llama_fields
from petalnode.models.families.mistral import WindowedConfig, read_windows
from petalnode.models.layers.attention import Attention, Scores, projections
from petalnode.models.layers.mlp import GatedMlp
from petalnode.models.layers.parts import Parts

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""What a missing key means."""


def read_qwen2(read: ConfigReader) -> WindowedConfig:
    """Return the configuration of a Qwen2 checkpoint."""
    return WindowedConfig(**qwen_fields(read, "qwen2"), attention_bias=True)


def read_qwen3(read: ConfigReader) -> WindowedConfig:
    """Return the configuration of a Qwen3 checkpoint."""
    fields = qwen_fields(read, "qwen3", default_head_dim=128)
    return WindowedConfig(**fields, attention_bias=read.flag("attention_bias"))


def qwen_fields(read: ConfigReader, family: str, **keys: Any) -> dict[str, Any]:
    """Return the fields of `WindowedConfig` without biases; `keys` are those of `common_fields`."""
    config = DEFAULTS | dict(read.config)
    if not read.flag("use_sliding_window"):
        config["sliding_window"] = None
    read = ConfigReader(config, read.generation)
    read.choice("hidden_act", SILU, default="silu")
    fields = llama_fields(read, family, **keys)
    first = read.size("max_window_layers", MAX_BLOCKS, least=0)
    slides = config["sliding_window"] is not None
    windows = read_windows(read, fields["num_blocks"], lambda index: slides and index >= first)
    return fields | {"windows": windows}


def qwen2_block(parts: Parts, config: WindowedConfig, index: int) -> PreNormBlock:
    """Return block `index` of a Qwen2."""
    scores = Scores(config.head_dim**-0.5, config.windows[index])
    qkv, out = projections(parts, config, bias=config.attention_bias, out_bias=False)
    attention = Attention(config, index, qkv, out, rope=config.rope, scores=scores)
    mlp = GatedMlp(parts, config.hidden_size, config.intermediate_size)
    return PreNormBlock(parts, config, attention, mlp)


def qwen3_attention(parts: Parts, config: WindowedConfig, index: int) -> Attention:
    """Return the attention of block `index` of a Qwen3: queries and keys normed head by head."""
    qkv, out = projections(parts, config, bias=config.attention_bias)
    return Attention(
        config,
        index,
        qkv,
        out,
        rope=config.rope,
        scores=Scores(config.head_dim**-0.5, config.windows[index]),
        query_norm=parts.rms_norm("self_attn.q_norm", config.head_dim, config.norm_eps),
        key_norm=parts.rms_norm("self_attn.k_norm", config.head_dim, config.norm_eps),
    )


def qwen3_block(parts: Parts, config: WindowedConfig, index: int) -> PreNormBlock:
    """Return block `index` of a Qwen3."""
    mlp = GatedMlp(parts, config.hidden_size, config.intermediate_size)
    return PreNormBlock(parts, config, qwen3_attention(parts, config, index), mlp)


QWEN2 = Family("qwen2", read_qwen2, qwen2_block, llama_client)
QWEN3 = Family("qwen3", read_qwen3, qwen3_block, llama_client)
