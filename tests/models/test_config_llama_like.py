"""Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3: config.json as published, both spellings, refusals."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from petalnode.errors import ModelError
from petalnode.models.families import read_config
from petalnode.models.families.gemma2 import GemmaConfig
from petalnode.models.families.mistral import WindowedConfig
from petalnode.models.layers.rope import inverse_frequencies
from petalnode.models.rope_config import RopeConfig, read_rope

Raw = dict[str, Any]

MISTRAL: Raw = {
    **{"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336},
    **{"rms_norm_eps": 1e-05, "vocab_size": 32000, "hidden_act": "silu", "rope_theta": 10000.0},
    **{"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768},
    **{"sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
NEMO = MISTRAL | {
    **{"hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128, "sliding_window": None},
    **{"max_position_embeddings": 131072, "rope_theta": 1000000.0, "vocab_size": 131072},
}
QWEN2: Raw = {
    **{"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "hidden_act": "silu"},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944},
    **{"rms_norm_eps": 1e-06, "vocab_size": 152064, "rope_theta": 1000000.0},
    **{"bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 32768},
    **{"max_window_layers": 20, "sliding_window": 131072, "use_sliding_window": False},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_dropout": 0.0},
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN3: Raw = QWEN2 | {
    **{"model_type": "qwen3", "hidden_size": 1024, "head_dim": 128, "attention_bias": False},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072},
    **{"sliding_window": None, "rope_scaling": None, "tie_word_embeddings": True},
}
GEMMA2: Raw = {
    **{"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "head_dim": 256},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216},
    **{
        "rms_norm_eps": 1e-06,
        "vocab_size": 256000,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    },
    **{"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 8192},
    **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": False},
    **{"query_pre_attn_scalar": 256, "sliding_window": 4096, "cache_implementation": "hybrid"},
}
GEMMA3_1B: Raw = {
    **{"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "head_dim": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6912},
    **{"rms_norm_eps": 1e-06, "vocab_size": 262144, "rope_theta": 1000000, "rope_scaling": None},
    **{"bos_token_id": 2, "eos_token_id": [1, 106], "max_position_embeddings": 32768},
    **{"rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6},
    **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": False},
    **{"query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"},
    **{"torch_dtype": "bfloat16", "cache_implementation": "hybrid", "pad_token_id": 0},
}
GEMMA3_4B: Raw = {
    **{"model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16"},
    **{"mm_tokens_per_image": 256, "vision_config": {"model_type": "siglip_vision_model"}},
    "text_config": {
        **{"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
        **{"intermediate_size": 10240, "sliding_window": 1024},
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}
GEMMA3_27B = GEMMA3_4B | {
    "text_config": {
        **{"model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62},
        **{"intermediate_size": 21504, "sliding_window": 1024, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168},
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}
PUBLISHED = {
    "Mistral-7B-v0.1": MISTRAL,
    "Mistral-7B-v0.3": MISTRAL | {"sliding_window": None, "vocab_size": 32768},
    "Mistral-Nemo": NEMO,
    "Qwen2.5-7B": QWEN2,
    "Qwen2.5-7B with yarn": QWEN2 | {"rope_scaling": YARN},
    "Qwen2 with windows": QWEN2 | {"use_sliding_window": True},
    "Qwen3-0.6B": QWEN3,
    "gemma-2-2b": GEMMA2,
    "gemma-3-1b-it": GEMMA3_1B,
    "gemma-3-4b-it": GEMMA3_4B,
    "gemma-3-27b-it": GEMMA3_27B,
}


def read(raw: Raw, **changes: Any) -> WindowedConfig:
    config = read_config(raw | changes)
    assert isinstance(config, WindowedConfig)
    return config


def read_gemma(raw: Raw, **changes: Any) -> GemmaConfig:
    config = read_config(raw | changes)
    assert isinstance(config, GemmaConfig)
    return config


def their_config(raw: Raw) -> Any:
    from transformers import AutoConfig

    rest = {key: value for key, value in deepcopy(raw).items() if key != "model_type"}
    return AutoConfig.for_model(raw["model_type"], **rest)


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_mean_what_transformers_makes_of_them(raw: Raw) -> None:
    config, theirs = read(raw), their_config(raw).get_text_config()
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * config.num_blocks
    sliding = [one == "sliding_attention" for one in types]
    assert config.windows == tuple(theirs.sliding_window if one else None for one in sliding)
    assert (config.num_blocks, config.num_heads) == (len(types), theirs.num_attention_heads)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert (config.vocab_size, config.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert (config.norm_eps, config.max_positions) == (
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
    )
    assert config.dtype == raw["torch_dtype"]
    assert config.tie_embeddings == theirs.tie_word_embeddings
    if isinstance(config, GemmaConfig):
        assert config.query_scalar == theirs.query_pre_attn_scalar
        assert config.score_softcap == theirs.attn_logit_softcapping
        assert config.logit_softcap == theirs.final_logit_softcapping


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED)
def test_todays_spelling_means_the_same(raw: Raw) -> None:
    """What transformers 5 writes of a published configuration is read as that was."""
    config = read(raw)
    written = their_config(raw).to_dict()
    assert "rope_parameters" in written.get("text_config", written)
    assert read(written) == config


def test_a_missing_key_is_not_a_null() -> None:
    assert read({k: v for k, v in MISTRAL.items() if k != "sliding_window"}).windows[0] == 4096
    assert read(MISTRAL, sliding_window=None).windows == (None,) * 32
    bare = {k: v for k, v in GEMMA2.items() if "softcapping" not in k}
    assert (read_gemma(bare).score_softcap, read_gemma(bare).logit_softcap) == (50.0, 30.0)
    none = read_gemma(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (none.score_softcap, none.logit_softcap) == (None, None)
    assert read({k: v for k, v in QWEN3.items() if k != "head_dim"}).head_dim == 128


def test_windows_of_some_blocks() -> None:
    late = read(QWEN2, use_sliding_window=True, sliding_window=9, max_window_layers=26)
    assert late.windows == (None,) * 26 + (9, 9)
    assert read(QWEN2, use_sliding_window=True, max_window_layers=0).windows == (131072,) * 28
    types = ["full_attention"] * 25 + ["sliding_attention"]
    assert read(GEMMA2, layer_types=types).windows == (None,) * 25 + (4096,)
    three = read(GEMMA3_1B, sliding_window_pattern=3).windows
    assert three[:6] == (512, 512, None, 512, 512, None)


def test_the_two_rotary_bases_of_gemma3() -> None:
    config = read_gemma(GEMMA3_4B)
    assert config.rope == RopeConfig(256, 1e6, "linear", 8.0)
    assert config.local_rope == RopeConfig(256, 1e4)
    other = read_gemma(GEMMA3_1B, rope_theta=5e5, rope_local_base_freq=200)
    assert (other.rope.base, other.local_rope.base) == (5e5, 200.0)
    both = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 3.0}}
    nested = read_gemma(GEMMA3_1B, rope_parameters=both)
    assert (nested.rope.base, nested.local_rope.base) == (7.0, 3.0)
    assert read_gemma(GEMMA2).local_rope == read_gemma(GEMMA2).rope


def test_what_stands_beside_the_text_config() -> None:
    assert read(GEMMA3_4B).eos_ids == (1, 106)
    assert read_config(GEMMA3_4B, {"eos_token_id": 106}).eos_ids == (106,)
    assert not read(GEMMA3_4B, tie_word_embeddings=False).tie_embeddings


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"beta_fast": 20.0, "beta_slow": 2},
        {"truncate": False},
        {"attention_factor": 1.5},
        {"mscale": 1.0, "mscale_all_dim": 0.8},
        {"mscale": 1.0},
        {"original_max_position_embeddings": 77},
        {"original_max_position_embeddings": 5},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_yarn_equals_transformers(more: Raw) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0}
    rope |= {"original_max_position_embeddings": 4096} | more
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 131072}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, head_dim=64, rope_parameters=dict(rope)))
    ours = read_rope({**sizes, "rope_parameters": rope}, 64, partial=True)
    torch.testing.assert_close(inverse_frequencies(ours), theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_factor == theirs.attention_scaling


def test_yarn_without_its_context_takes_the_models() -> None:
    ours = read(QWEN2, rope_scaling={"type": "yarn", "factor": 2.0}).rope
    assert (ours.original_max_positions, ours.beta_fast, ours.beta_slow) == (32768, 32.0, 1.0)


TOO_MUCH = 1 << 40
REFUSED: list[tuple[Raw, Raw, str]] = [
    (MISTRAL, {"sliding_window": 0}, "sliding_window = 0"),
    (MISTRAL, {"sliding_window": TOO_MUCH}, "sliding_window"),
    (MISTRAL, {"sliding_window": True}, "sliding_window = True"),
    (MISTRAL, {"hidden_act": "gelu"}, "hidden_act"),
    (MISTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types.*the same for all blocks"),
    (MISTRAL, {"layer_types": ["sliding_attention"] * 31}, "layer_types.*32 of"),
    (QWEN2, {"layer_types": ["linear_attention"] * 28}, "layer_types"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 28}, "sliding_window = None"),
    (QWEN2, {"layer_types": [["full_attention"]] * 28}, "layer_types"),
    (QWEN2, {"use_sliding_window": 1}, "use_sliding_window"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
    (QWEN2, {"hidden_act": "relu"}, "hidden_act"),
    (QWEN2, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "'mrope'"),
    (QWEN2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    (QWEN2, {"rope_scaling": YARN | {"factor": 0}}, "rope factor"),
    (QWEN2, {"rope_scaling": {"type": "yarn"}}, "lacks rope factor"),
    (QWEN2, {"rope_scaling": YARN | {"beta_fast": 0.5}}, "rope beta_fast.*at least beta_slow"),
    (QWEN2, {"rope_scaling": YARN | {"beta_slow": -1}}, "rope beta_slow"),
    (QWEN2, {"rope_scaling": YARN | {"truncate": "no"}}, "rope truncate"),
    (QWEN2, {"rope_scaling": YARN | {"attention_factor": float("inf")}}, "rope attention_factor"),
    (QWEN2, {"rope_scaling": YARN | {"mscale": "1"}}, "rope mscale"),
    (QWEN2, {"rope_scaling": YARN, "rope_theta": 1.0}, "rope rope_theta = 1.0.*above 1"),
    (QWEN3, {"attention_bias": "yes"}, "attention_bias"),
    (QWEN3, {"head_dim": 7}, "head_dim"),
    (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA2, {"hidden_activation": "quick_gelu"}, "hidden_activation"),
    (GEMMA2, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
    (GEMMA2, {"final_logit_softcapping": -30.0}, "final_logit_softcapping"),
    (GEMMA2, {"query_pre_attn_scalar": float("nan")}, "query_pre_attn_scalar"),
    (GEMMA2, {"sliding_window": None}, "sliding_window = None.*some blocks"),
    (GEMMA2, {"sliding_window_pattern": 3}, "sliding_window_pattern.*2, as in every Gemma 2"),
    (GEMMA3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*null"),
    (GEMMA3_1B, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.*full_attention"),
    (GEMMA3_1B, {"rope_parameters": [1]}, "rope_parameters"),
    (GEMMA3_1B, {"rope_parameters": {"sliding_attention": 3}}, "rope_parameters = 3"),
    (GEMMA3_1B, {"rope_local_base_freq": 0}, "rope_local_base_freq = 0"),
    (GEMMA3_1B, {"rope_theta": "1e6"}, "rope_theta = '1e6'"),
    (GEMMA3_1B, {"rope_scaling": {"rope_type": "yarn"}}, "lacks rope factor"),
    (GEMMA3_4B, {"text_config": None}, "text_config"),
    (GEMMA3_4B, {"text_config": {"hidden_size": 64}}, "lacks num_hidden_layers"),
    (GEMMA3_4B, {"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
    (GEMMA3_4B, {"torch_dtype": "int4"}, "torch_dtype"),
]


@pytest.mark.parametrize(("raw", "changes", "words"), REFUSED)
def test_what_is_refused(raw: Raw, changes: Raw, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read(raw, **changes)
    assert caught.value.remedy
    assert len(str(caught.value)) < 300
