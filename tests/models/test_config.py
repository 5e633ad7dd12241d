"""Reading config.json: both spellings of rotary scaling, defaults, and every refusal."""

from typing import Any

import pytest
import torch

from petalnode.errors import ModelError
from petalnode.models.families import FAMILIES, read_config
from petalnode.models.families.llama import LlamaConfig
from petalnode.models.layers.rope import inverse_frequencies
from petalnode.models.rope_config import RopeConfig

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "intermediate_size": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes: Any) -> LlamaConfig:
    config = read_config(BASE | changes)
    assert isinstance(config, LlamaConfig)
    return config


def test_defaults_of_old_configs() -> None:
    """Llama 1 wrote no key for what later versions vary."""
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (8, 8, 2048)
    assert (config.rope, config.norm_eps) == (RopeConfig(8), 1e-6)
    assert not any((config.attention_bias, config.mlp_bias, config.tie_embeddings))
    assert (config.bos_id, config.eos_ids, config.dtype) == (None, (), "float32")


@pytest.mark.parametrize("torch_spelling", [{"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}])
def test_dtype(torch_spelling: dict[str, str]) -> None:
    assert read(**torch_spelling).dtype == "bfloat16"


def test_both_spellings_of_scaling_agree() -> None:
    old = read(rope_theta=500000.0, rope_scaling=LLAMA3)
    new = read(rope_parameters=LLAMA3 | {"rope_theta": 500000.0})
    assert old.rope == new.rope == RopeConfig(8, 500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    oldest = read(rope_scaling={"type": "linear", "factor": 4})
    assert oldest.rope == RopeConfig(8, 10000.0, "linear", 4.0)
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope.base == 5e5


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_frequencies_equal_transformers(kind: str) -> None:
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = LLAMA3 | {"rope_type": kind, "rope_theta": 500000.0}
    if kind == "default":
        parameters = {"rope_type": "default", "rope_theta": 500000.0}
    if kind == "linear":
        parameters = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 32.0}
    theirs = LlamaRotaryEmbedding(TheirConfig(**BASE, head_dim=128, rope_parameters=parameters))
    ours = inverse_frequencies(read(head_dim=128, rope_parameters=parameters).rope)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)


def test_ends_of_text() -> None:
    """generation_config.json is asked first, as transformers' generate does."""
    config = BASE | {"eos_token_id": 2}
    assert read_config(config).eos_ids == (2,)
    assert read_config(config, {"eos_token_id": [3, 4]}).eos_ids == (3, 4)
    assert read_config(config, {}).eos_ids == (2,)


@pytest.mark.parametrize("family", ["gpt2", "mamba", "", 7, ["llama"]])
def test_other_families(family: Any) -> None:
    with pytest.raises(ModelError) as caught:
        read(model_type=family)
    assert str(family) in caught.value.cause
    for supported in FAMILIES:
        assert supported in caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", 1 << 40),
        ("hidden_size", 64.0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("num_attention_heads", 65),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 1 << 20),
        ("vocab_size", 1 << 30),
        ("intermediate_size", [96]),
        ("head_dim", 7),
        ("head_dim", 1 << 20),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("rope_scaling", [1]),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("partial_rotary_factor", 0.5),
        ("hidden_act", "gelu"),
        ("attention_bias", "yes"),
        ("tie_word_embeddings", 1),
        ("bos_token_id", 100),
        ("eos_token_id", -1),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", list(range(2)) * 300),
        ("torch_dtype", "int8"),
        ("max_position_embeddings", 0),
        ("is_causal", False),
        ("is_causal", 1),
        ("per_layer_config", {"0": {"intermediate_size": 8}}),
    ],
)
def test_values_that_cannot_be(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json has") as caught:
        read(**{key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", sorted(set(BASE)))
def test_missing_keys(key: str) -> None:
    with pytest.raises(ModelError, match=f"lacks {key}"):
        read_config({k: v for k, v in BASE.items() if k != key})


def test_scaling_that_is_not_supported() -> None:
    with pytest.raises(ModelError, match=r"'dynamic' is not supported.*llama3"):
        read(rope_scaling={"type": "dynamic", "factor": 4.0})
    with pytest.raises(ModelError, match="high_freq_factor"):
        read(rope_scaling=LLAMA3 | {"high_freq_factor": 0.5})
    with pytest.raises(ModelError, match="original_max_position_embeddings"):
        read(rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("original")})
