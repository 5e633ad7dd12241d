"""config.json of families with experts: those of well-known checkpoints, and every refusal."""

from typing import Any

import pytest

from petalnode.errors import ModelError
from petalnode.models.families import read_config
from petalnode.models.families.gpt_oss import GptOssConfig
from petalnode.models.families.mixtral import MAX_EXPERTS_IN_ALL, MixtralConfig
from petalnode.models.families.qwen3_moe import Qwen3MoeConfig
from petalnode.models.layout import block_layout
from petalnode.models.rope_config import RopeConfig

MIXTRAL_8X7B: dict[str, Any] = {
    **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    **{"max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
    **{"rms_norm_eps": 1e-05, "hidden_act": "silu", "torch_dtype": "bfloat16"},
    **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
}
QWEN3_30B_A3B: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": []},
    **{"norm_topk_prob": True, "attention_bias": False, "vocab_size": 151936},
    **{"max_position_embeddings": 40960, "max_window_layers": 48, "rope_scaling": None},
    **{"rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False},
    **{"rms_norm_eps": 1e-06, "hidden_act": "silu", "torch_dtype": "bfloat16"},
}
GPT_OSS_20B: dict[str, Any] = {
    **{"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880},
    **{"num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4},
    **{"experts_per_token": 4, "vocab_size": 201088, "max_position_embeddings": 131072},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    **{"sliding_window": 128, "swiglu_limit": 7.0, "rope_theta": 150000},
    **{"rms_norm_eps": 1e-05, "hidden_act": "silu", "attention_bias": True},
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"original_max_position_embeddings": 4096, "truncate": False},
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


def test_mixtral() -> None:
    config = read_config(MIXTRAL_8X7B)
    assert isinstance(config, MixtralConfig)
    assert (config.num_experts, config.experts_per_token, config.head_dim) == (8, 2, 128)
    assert config.windows == (None,) * 32
    assert config.rope == RopeConfig(128, 1e6)
    layout = block_layout(config, 31)
    assert layout["block_sparse_moe.gate.weight"].shape == (8, 4096)
    assert layout["block_sparse_moe.experts.7.w1.weight"].shape == (14336, 4096)
    assert layout["block_sparse_moe.experts.0.w2.weight"].shape == (4096, 14336)
    assert layout["block_sparse_moe.experts.0.w3.weight"].in_linear
    assert len(layout) == 2 + 4 + 1 + 3 * 8


def test_a_window_goes_for_all_blocks_of_a_mixtral() -> None:
    config = read_config(MIXTRAL_8X7B | {"sliding_window": 4096})
    assert isinstance(config, MixtralConfig)
    assert config.windows == (4096,) * 32


def test_what_old_mixtrals_do_not_say() -> None:
    missing = ("rope_theta", "rms_norm_eps", "sliding_window", "hidden_act")
    config = read_config({k: v for k, v in MIXTRAL_8X7B.items() if k not in missing})
    assert config == read_config(MIXTRAL_8X7B)


def test_qwen3_moe() -> None:
    config = read_config(QWEN3_30B_A3B)
    assert isinstance(config, Qwen3MoeConfig)
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (128, 8, 768)
    assert config.renormalise
    assert config.dense == frozenset()
    assert config.windows == (None,) * 48
    layout = block_layout(config, 0)
    assert layout["mlp.gate.weight"].shape == (128, 2048)
    assert not layout["mlp.gate.weight"].in_linear
    assert layout["mlp.experts.127.gate_proj.weight"].shape == (768, 2048)
    assert layout["mlp.experts.0.up_proj.weight"].shape == (768, 2048)
    assert layout["mlp.experts.0.down_proj.weight"].shape == (2048, 768)
    assert layout["self_attn.q_norm.weight"].shape == (128,)


def test_qwen3_moe_as_transformers_5_spells_it() -> None:
    renamed = {k: v for k, v in QWEN3_30B_A3B.items() if k not in ("num_experts", "rope_theta")}
    renamed["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    renamed["num_local_experts"] = 128
    assert read_config(renamed) == read_config(QWEN3_30B_A3B)


def test_which_blocks_of_a_qwen3_moe_are_dense() -> None:
    sparse = {"num_hidden_layers": 7, "decoder_sparse_step": 3, "mlp_only_layers": [2]}
    config = read_config(QWEN3_30B_A3B | sparse)
    assert isinstance(config, Qwen3MoeConfig)
    assert config.dense == {0, 1, 2, 3, 4, 6}
    assert "mlp.gate_proj.weight" in block_layout(config, 2)
    assert "mlp.gate.weight" in block_layout(config, 5)
    windowed = read_config(QWEN3_30B_A3B | {"use_sliding_window": True, "sliding_window": 64})
    assert isinstance(windowed, Qwen3MoeConfig)
    assert windowed.windows == (64,) * 48


def test_gpt_oss() -> None:
    config = read_config(GPT_OSS_20B)
    assert isinstance(config, GptOssConfig)
    assert (config.num_experts, config.experts_per_token, config.limit) == (32, 4, 7.0)
    assert config.windows == (128, None, 128, None)
    assert (config.rope.kind, config.rope.base, config.rope.truncate) == ("yarn", 150000.0, False)
    assert config.attention_bias
    assert config.mxfp4
    assert config.dtype == "bfloat16"  # its config.json does not say
    layout = block_layout(config, 0)
    blocks, scales = (layout[f"mlp.experts.gate_up_proj_{end}"] for end in ("blocks", "scales"))
    assert (blocks.shape, scales.shape) == ((32, 5760, 90, 16), (32, 5760, 90))
    assert (blocks.numel, scales.numel) == (32 * 5760 * 2880, 0)
    assert layout["mlp.experts.down_proj_blocks"].shape == (32, 2880, 90, 16)
    assert layout["mlp.experts.down_proj_bias"].shape == (32, 2880)
    assert layout["mlp.router.bias"].shape == (32,)
    assert layout["self_attn.sinks"].shape == (64,)


def test_gpt_oss_unquantized() -> None:
    config = read_config(GPT_OSS_20B | {"quantization_config": None, "layer_types": None})
    assert isinstance(config, GptOssConfig)
    assert not config.mxfp4
    assert config.windows == (128, None, 128, None)
    layout = block_layout(config, 0)
    assert layout["mlp.experts.gate_up_proj"].shape == (32, 2880, 5760)
    assert layout["mlp.experts.down_proj"].shape == (32, 2880, 2880)


def test_what_gpt_oss_does_not_have_to_say() -> None:
    """As transformers: the scaling above is the family's own."""
    missing = ("rope_scaling", "rope_theta", "sliding_window", "swiglu_limit", "head_dim")
    config = read_config({k: v for k, v in GPT_OSS_20B.items() if k not in missing})
    assert config == read_config(GPT_OSS_20B)


@pytest.mark.parametrize("base", [MIXTRAL_8X7B, QWEN3_30B_A3B, GPT_OSS_20B])
def test_a_missing_key_means_what_it_means_to_transformers(base: dict[str, Any]) -> None:
    from transformers import AutoConfig

    missing = ("num_key_value_heads", "max_position_embeddings", "sliding_window")
    raw = {k: v for k, v in base.items() if k not in missing} | {"use_sliding_window": True}
    ours, theirs = read_config(raw), AutoConfig.for_model(**raw)
    assert isinstance(ours, MixtralConfig)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.windows[0] == theirs.sliding_window


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (MIXTRAL_8X7B, "num_local_experts", 0),
        (MIXTRAL_8X7B, "num_local_experts", 1 << 20),
        (MIXTRAL_8X7B, "num_local_experts", MAX_EXPERTS_IN_ALL // 32 + 1),
        (MIXTRAL_8X7B, "num_local_experts", 8.0),
        (MIXTRAL_8X7B, "num_experts", 9),
        (MIXTRAL_8X7B, "num_experts_per_tok", 9),
        (MIXTRAL_8X7B, "num_experts_per_tok", 0),
        (MIXTRAL_8X7B, "sliding_window", 0),
        (MIXTRAL_8X7B, "hidden_act", "gelu"),
        (MIXTRAL_8X7B, "partial_rotary_factor", 0.5),
        (QWEN3_30B_A3B, "moe_intermediate_size", -1),
        (QWEN3_30B_A3B, "norm_topk_prob", "yes"),
        (QWEN3_30B_A3B, "decoder_sparse_step", 0),
        (QWEN3_30B_A3B, "mlp_only_layers", [48]),
        (QWEN3_30B_A3B, "mlp_only_layers", [-1]),
        (QWEN3_30B_A3B, "mlp_only_layers", ["0"]),
        (QWEN3_30B_A3B, "mlp_only_layers", 3),
        (QWEN3_30B_A3B, "use_sliding_window", 1),
        (QWEN3_30B_A3B, "hidden_act", "relu"),
        (GPT_OSS_20B, "experts_per_token", 3),
        (GPT_OSS_20B, "layer_types", ["full_attention"]),
        (GPT_OSS_20B, "sliding_window", None),
        (GPT_OSS_20B, "swiglu_limit", -7.0),
        (GPT_OSS_20B, "swiglu_limit", float("inf")),
        (GPT_OSS_20B, "attention_bias", 1),
        (GPT_OSS_20B, "hidden_act", "gelu"),
        (GPT_OSS_20B, "intermediate_size", 2896),
        (GPT_OSS_20B, "hidden_size", 2896),
    ],
)
def test_values_that_cannot_be(base: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"config\.json has {key} = .* must be ") as caught:
        read_config(base | {key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("base", "key"),
    [
        (MIXTRAL_8X7B, "num_local_experts"),
        (MIXTRAL_8X7B, "num_experts_per_tok"),
        (QWEN3_30B_A3B, "moe_intermediate_size"),
    ],
)
def test_missing_keys(base: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=f"lacks {key}"):
        read_config({k: v for k, v in base.items() if k != key})


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (QWEN3_30B_A3B, "gptq"),
        (QWEN3_30B_A3B, "fp8"),
        (MIXTRAL_8X7B, "awq"),
        (MIXTRAL_8X7B, "mxfp4"),
        (GPT_OSS_20B, "bitsandbytes"),
        (GPT_OSS_20B, None),
        (GPT_OSS_20B, ["mxfp4"]),
    ],
)
def test_weights_that_are_quantized_otherwise(base: dict[str, Any], method: Any) -> None:
    with pytest.raises(ModelError, match=r"quantized already.*--quant") as caught:
        read_config(base | {"quantization_config": {"quant_method": method}})
    assert str(method)[:60] in str(caught.value)
    with pytest.raises(ModelError, match="quantized already"):
        read_config(base | {"quantization_config": "fp8"})
