"""config.json of BLOOM, OPT and Falcon: what hub checkpoints write, and every refusal."""

from typing import Any

import pytest

from petalnode.errors import LocalProtocolError, ModelError
from petalnode.models.families import read_config
from petalnode.models.families.bloom import BloomConfig
from petalnode.models.families.falcon import FalconConfig
from petalnode.models.families.opt import OptConfig
from petalnode.models.loading import load_client
from petalnode.models.rope_config import RopeConfig

from ..checkpoints import MakeCheckpoint
from .reference import Local
from .shapes import SHAPES

BLOOM: dict[str, Any] = {
    **{"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16},
    **{"vocab_size": 250880, "n_inner": None, "offset_alibi": 100, "seq_length": 2048},
}
OPT: dict[str, Any] = {
    **{"model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072},
    **{"num_attention_heads": 12, "max_position_embeddings": 2048, "vocab_size": 50272},
    **{"word_embed_proj_dim": 768, "do_layer_norm_before": True, "activation_function": "relu"},
}
FALCON: dict[str, Any] = {
    **{"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "bias": False},
    **{"num_attention_heads": 71, "vocab_size": 65024, "multi_query": True, "alibi": False},
    **{"parallel_attn": True, "new_decoder_architecture": False, "layer_norm_epsilon": 1e-05},
}
FALCON_40B = FALCON | {
    **{"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60},
    **{"new_decoder_architecture": True, "num_kv_heads": 8},
}


def bloom(**changes: Any) -> BloomConfig:
    config = read_config(BLOOM | changes)
    assert isinstance(config, BloomConfig)
    return config


def opt(**changes: Any) -> OptConfig:
    config = read_config(OPT | changes)
    assert isinstance(config, OptConfig)
    return config


def falcon(base: dict[str, Any] = FALCON, **changes: Any) -> FalconConfig:
    config = read_config(base | changes)
    assert isinstance(config, FalconConfig)
    return config


def test_both_spellings_of_bloom() -> None:
    """bloom-560m as first published, and as transformers saves it now."""
    old = bloom()
    new = {"hidden_size": 1024, "n_head": 16, "num_hidden_layers": 24}
    same = {"model_type": "bloom", "vocab_size": 250880}
    assert read_config(same | new) == old
    assert (old.hidden_size, old.num_heads, old.num_kv_heads, old.head_dim) == (1024, 16, 16, 64)
    assert (old.num_blocks, old.max_positions, old.tie_embeddings) == (24, 2048, True)
    assert (old.norm_eps, old.residual_after_norm) == (1e-5, False)


def test_opt_125m() -> None:
    config = opt()
    assert (config.hidden_size, config.embed_size, config.intermediate_size) == (768, 768, 3072)
    assert (config.norm_first, config.final_norm, config.affine, config.bias) == (True,) * 4
    assert (config.activation, config.tie_embeddings, config.max_positions) == ("relu", True, 2048)


def test_opt_350m() -> None:
    """Norms behind each sublayer and none at the end; embeddings of half the width."""
    config = opt(hidden_size=1024, num_attention_heads=16, word_embed_proj_dim=512)
    assert (config.hidden_size, config.embed_size) == (1024, 512)
    after = opt(do_layer_norm_before=False)
    assert (after.norm_first, after.final_norm) == (False, False)
    assert opt(_remove_final_layer_norm=True).final_norm is False


def test_falcon_7b() -> None:
    config = falcon()
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (71, 1, 64)
    assert (config.intermediate_size, config.rope) == (4 * 4544, RopeConfig(64))
    assert (config.parallel, config.two_norms, config.bias) == (True, False, False)
    assert falcon(num_kv_heads=71) == config, "as transformers saves it"
    assert falcon(max_position_embeddings=2048, num_ln_in_parallel_attn=None) == config


def test_falcon_new_decoder() -> None:
    """40B and 180B have a norm for each branch, 11B has one; `multi_query` means nothing there."""
    config = falcon(FALCON_40B)
    assert (config.num_kv_heads, config.two_norms, config.parallel) == (8, True, True)
    assert falcon(FALCON_40B, multi_query=False) == config
    assert falcon(FALCON_40B, num_ln_in_parallel_attn=1).two_norms is False
    assert falcon(FALCON_40B, ffn_hidden_size=100).intermediate_size == 100
    assert falcon(FALCON_40B, rope_theta=5000042.0).rope == RopeConfig(64, 5000042.0)


def test_falcon_rw() -> None:
    changes = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
    config = falcon(hidden_size=2048, num_attention_heads=32, **changes)
    assert (config.num_kv_heads, config.rope) == (32, None)
    assert (config.parallel, config.bias) == (False, True)


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (BLOOM, {"n_embed": 1000}, "num_attention_heads = 16"),
        (BLOOM, {"hidden_size": 1000}, "hidden_size = 1000"),
        (BLOOM, {"n_head": 8}, "num_attention_heads = 16"),
        (BLOOM, {"n_head": True, "num_attention_heads": None}, "n_head"),
        (BLOOM, {"head_dim": 32}, "num_attention_heads = 16"),
        (BLOOM, {"n_layer": 0}, "n_layer"),
        (BLOOM, {"seq_length": "2048"}, "seq_length"),
        (BLOOM, {"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        (BLOOM, {"apply_residual_connection_post_layernorm": 1}, "apply_residual"),
        (OPT, {"num_attention_heads": 7}, "num_attention_heads = 7"),
        (OPT, {"ffn_dim": 1 << 30}, "ffn_dim"),
        (OPT, {"activation_function": "mish"}, "activation_function = 'mish'"),
        (OPT, {"activation_function": ["relu"]}, "activation_function"),
        (OPT, {"word_embed_proj_dim": 0}, "word_embed_proj_dim"),
        (OPT, {"do_layer_norm_before": None, "_remove_final_layer_norm": "no"}, "_remove_final"),
        (OPT, {"layer_norm_elementwise_affine": 0}, "layer_norm_elementwise_affine"),
        (OPT, {"enable_bias": "yes"}, "enable_bias"),
        (OPT, {"max_position_embeddings": -1}, "max_position_embeddings"),
        (FALCON, {"num_attention_heads": 72}, "num_attention_heads = 72"),
        (FALCON, {"multi_query": False, "num_kv_heads": 1}, "num_kv_heads = 1"),
        (FALCON, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        (FALCON, {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3"),
        (FALCON, {"activation": "xielu"}, "activation = 'xielu'"),
        (FALCON, {"hidden_size": 71 * 3}, "head_dim = 3"),
        (FALCON, {"rope_scaling": {"type": "linear"}}, "rope factor"),
        (FALCON, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (FALCON, {"alibi": 1}, "alibi"),
        (FALCON, {"ffn_hidden_size": 0}, "ffn_hidden_size"),
        (FALCON_40B, {"parallel_attn": False}, "parallel_attn = False"),
        (FALCON_40B, {"num_kv_heads": 7}, "num_kv_heads = 7"),
        (FALCON_40B, {"num_kv_heads": 256}, "num_kv_heads = 256"),
    ],
)
def test_values_that_cannot_be(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(base | changes)
    assert caught.value.cause.startswith(("config.json has ", "config.json lacks "))
    assert named in caught.value.cause
    assert caught.value.remedy
    assert len(str(caught.value)) < 300


def test_scaling_that_falcon_does_not_have() -> None:
    with pytest.raises(ModelError, match=r"'dynamic' is not supported"):
        falcon(rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def test_opt_has_no_position_beyond_its_table(tiny_checkpoint: MakeCheckpoint) -> None:
    local = Local(tiny_checkpoint(family="opt", **SHAPES["opt"]["norms first"]))
    row, limit = local.row(), local.checkpoint.config.max_positions
    assert len(local.step([row], [[5] * limit])) == limit
    with pytest.raises(LocalProtocolError, match=f"only {limit} positions"):
        local.step([row], [[5]])


def test_embeddings_of_opt_count_what_they_take(tiny_checkpoint: MakeCheckpoint) -> None:
    """Two tables, two projections, two tied ends: the head adds nothing."""
    shape = SHAPES["opt"]["350M: norms last, projected embeddings"]
    client = load_client(Local(tiny_checkpoint(family="opt", **shape)).checkpoint)
    small, hidden = shape["word_embed_proj_dim"], shape["hidden_size"]
    rows = shape["max_position_embeddings"] + 2
    numbers = shape["vocab_size"] * small + rows * hidden + 2 * small * hidden
    assert client.param_bytes == 4 * numbers


def test_bloom_that_sums_as_its_training_machines_did() -> None:
    assert bloom(slow_but_exact=True, pretraining_tp=1).family == "bloom"
    with pytest.raises(ModelError, match="slow_but_exact"):
        bloom(slow_but_exact=True, pretraining_tp=4)
