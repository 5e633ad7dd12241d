"""config.json of Phi-3 to Phi-4: LongRoPE in all its spellings, and every refusal."""

from typing import Any

import pytest
import torch

from petalnode.errors import ModelError
from petalnode.models.families import read_config
from petalnode.models.families.phi3 import Phi3Config
from petalnode.models.layers.rope import inverse_frequencies
from petalnode.models.rope_config import RopeConfig

BASE: dict[str, Any] = {
    **{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32},
    **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    **{"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047, "hidden_act": "silu"},
}
SHORT, LONG = [1.0 + 0.05 * i for i in range(48)], [1.0 + 1.3 * i for i in range(48)]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
MINI_128K = BASE | {"max_position_embeddings": 131072, "rope_scaling": LONGROPE}
PHI4_MINI = MINI_128K | {
    **{"num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75},
    **{"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
    **{"lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1},
}


def read(base: dict[str, Any] = BASE, **changes: Any) -> Phi3Config:
    config = read_config(base | changes)
    assert isinstance(config, Phi3Config)
    return config


def test_mini_4k() -> None:
    config = read()
    assert (config.head_dim, config.window, config.max_positions) == (96, 2047, 4096)
    assert (config.rope, config.norm_eps, config.tie_embeddings) == (RopeConfig(96), 1e-5, False)
    assert read(sliding_window=None).window is None
    assert read(max_position_embeddings=16384, rope_theta=250000).max_positions == 16384


def test_longrope_ends_where_its_factors_change() -> None:
    config = read(MINI_128K)
    assert config.max_positions == 4096
    assert config.rope.pair_factors == tuple(SHORT)
    assert read(MINI_128K, original_max_position_embeddings=None).max_positions == 4096
    assert read(MINI_128K, original_max_position_embeddings=8192).max_positions == 8192


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_older_names_of_longrope(name: str) -> None:
    assert read(MINI_128K, rope_scaling=LONGROPE | {"type": name}) == read(MINI_128K)


def test_new_spelling() -> None:
    """transformers 5 writes the rotary parameters in one object."""
    parameters = LONGROPE | {"rope_type": "longrope", "rope_theta": 10000.0, "type": None}
    parameters |= {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75}
    old = read(PHI4_MINI)
    new = read(
        PHI4_MINI,
        rope_scaling=None,
        rope_theta=None,
        partial_rotary_factor=None,
        rope_parameters=parameters,
    )
    assert new == old
    assert (old.rope.dim, old.head_dim, old.num_kv_heads) == (96, 128, 8)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({}, 131072),
        ({"factor": 8.0}, 131072),
        ({"attention_factor": 1.5}, 131072),
        ({"factor": 0.5}, 131072),
        ({}, 4096),
        ({}, 2048),
    ],
)
def test_rotation_equals_transformers(scaling: dict[str, float], context: int) -> None:
    from transformers import Phi3Config as TheirConfig
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = MINI_128K | {
        "max_position_embeddings": context,
        "rope_scaling": LONGROPE | scaling,
    }
    theirs = Phi3RotaryEmbedding(TheirConfig(**config | {"rope_scaling": LONGROPE | scaling}))
    ours = read(config).rope
    torch.testing.assert_close(inverse_frequencies(ours), theirs.inv_freq, rtol=0, atol=0)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"lm_head_bias": True}, "lm_head_bias = True"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"sliding_window": "all"}, "sliding_window = 'all'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({"partial_rotary_factor": 0.01}, "head_dim = 96"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings = 0"),
        ({"rope_scaling": 7}, "rope_scaling = 7"),
        ({"rope_scaling": LONGROPE | {"short_factor": None}}, "short_factor = None"),
        ({"rope_scaling": LONGROPE | {"short_factor": SHORT[1:]}}, "short_factor = ["),
        ({"rope_scaling": LONGROPE | {"short_factor": [0.0, *SHORT[1:]]}}, "48 numbers above 0"),
        ({"rope_scaling": LONGROPE | {"short_factor": ["1", *SHORT[1:]]}}, "48 numbers above 0"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1e99, *SHORT[1:]]}}, "48 numbers above 0"),
        ({"rope_scaling": LONGROPE | {"factor": -1.0}}, "rope factor = -1.0"),
        ({"rope_scaling": LONGROPE | {"attention_factor": "2"}}, "attention_factor = '2'"),
        (
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 1},
            "original_max_position_embeddings = 1",
        ),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json has") as caught:
        read(**changes)
    assert named in caught.value.cause
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_scaling_that_phi_does_not_have(kind: str) -> None:
    with pytest.raises(ModelError, match=rf"'{kind}' is not supported.*longrope"):
        read(rope_scaling={"rope_type": kind, "factor": 2.0})
