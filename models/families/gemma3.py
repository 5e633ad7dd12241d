"""The text models of Gemma 3 (arXiv 2503.19786), alone or beside a vision tower that is left out.

Gemma 2 with normed queries and keys instead of capped scores; blocks with a window have a rotary
base of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from petalnode.models.config import ConfigReader, invalid
from petalnode.models.families.family import Family
from petalnode.models.families.gemma2 import (
    SHARED_DEFAULTS,
    GemmaConfig,
    SandwichBlock,
    gemma_client,
    gemma_fields,
    gemma_scores,
)
from petalnode.models.layers.attention import Attention, projections
from petalnode.models.layers.parts import Parts
from petalnode.models.rope_config import MAX_ROPE_NUMBER, read_rope

DEFAULTS = SHARED_DEFAULTS | {
    **{"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
    **{"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
}
"""What a missing key means: the files of the larger models say only what differs from it."""
OUTER = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
"""Keys that a model with a vision tower has beside its text_config; the last word is theirs."""


def read_gemma3(read: ConfigReader) -> GemmaConfig:
    """Return the text model's configuration of a Gemma 3 checkpoint with a vision tower."""
    text = read.config.get("text_config")
    if not isinstance(text, Mapping):
        raise invalid("text_config", text, "an object")
    if text.get("final_logit_softcapping") is not None:
        wanted = "null, because no Gemma 3 with a vision tower caps logits"
        raise invalid("final_logit_softcapping", text["final_logit_softcapping"], wanted)
    own = {key: text[key] for key in text if key != "tie_word_embeddings"}
    outer = {key: read.config[key] for key in OUTER if read.config.get(key) is not None}
    return replace(read_gemma3_text(ConfigReader(own | outer, read.generation)), family="gemma3")


def read_gemma3_text(read: ConfigReader) -> GemmaConfig:
    """Return the configuration of a Gemma 3 checkpoint for text alone."""
    config = DEFAULTS | dict(read.config)
    if config.get("attn_logit_softcapping") is not None:
        wanted = "null, because no Gemma 3 caps scores"
        raise invalid("attn_logit_softcapping", config["attn_logit_softcapping"], wanted)
    rope = config | _rope_keys(config, "full_attention", "rope_theta")
    local = config | _rope_keys(config, "sliding_attention", "rope_local_base_freq")
    fields = gemma_fields(ConfigReader(rope, read.generation), "gemma3_text")
    local_rope = read_rope(local, fields["head_dim"])
    return GemmaConfig(**fields, local_rope=local_rope, score_softcap=None)


def _rope_keys(config: Mapping[str, Any], blocks: str, base: str) -> dict[str, Any]:
    """Return the rotary keys of one kind of blocks as a model with one kind would have them."""
    theta = ConfigReader(config).number(base, 0.0, MAX_ROPE_NUMBER, default=DEFAULTS[base])
    both = config.get("rope_parameters") or {}
    if not isinstance(both, Mapping) or set(both) - {"full_attention", "sliding_attention"}:
        raise invalid("rope_parameters", both, "an object for full_attention and sliding_attention")
    own = both.get(blocks)
    scaling = config.get("rope_scaling") if blocks == "full_attention" else None
    if isinstance(own, Mapping) and isinstance(scaling, Mapping):
        scaling = dict(own) | dict(scaling)
    return {"rope_theta": theta, "rope_parameters": own, "rope_scaling": scaling}


def gemma3_block(parts: Parts, config: GemmaConfig, index: int) -> SandwichBlock:
    """Return block `index` of a Gemma 3."""
    qkv, out = projections(parts, config, bias=config.attention_bias)
    size, eps = config.head_dim, config.norm_eps
    attention = Attention(
        config,
        index,
        qkv,
        out,
        rope=config.rope if config.windows[index] is None else config.local_rope,
        scores=gemma_scores(config, index),
        query_norm=parts.rms_norm("self_attn.q_norm", size, eps, plus_one=True),
        key_norm=parts.rms_norm("self_attn.k_norm", size, eps, plus_one=True),
    )
    return SandwichBlock(parts, config, attention)


ROOTS = ("model.", "language_model.model.", "model.language_model.")
VISION = ("vision_tower.", "multi_modal_projector.")
GEMMA3_TEXT = Family(
    "gemma3_text",
    read_gemma3_text,
    gemma3_block,
    gemma_client,
    roots=ROOTS,
    apart=(*VISION, *(f"model.{one}" for one in VISION)),
)
GEMMA3 = replace(
    GEMMA3_TEXT, name="gemma3", read=read_gemma3, modules="model.language_model.layers.{}."
)
