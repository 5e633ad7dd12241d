"""The tensors that published models hold, by name and shape, against transformers' empty models."""

from typing import Any

import pytest
import torch

from petalnode.models.families import read_config
from petalnode.models.layout import expected_layout

RW: dict[str, Any] = {"model_type": "falcon", "alibi": True, "bias": True, "multi_query": False}
NEW: dict[str, Any] = {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8}
PUBLISHED: dict[str, dict[str, Any]] = {
    "bigscience/bloom": {
        **{"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112},
        **{"vocab_size": 250880, "pretraining_tp": 4, "slow_but_exact": False},
    },
    "facebook/opt-175b": {
        **{"model_type": "opt", "hidden_size": 12288, "num_hidden_layers": 96, "ffn_dim": 49152},
        **{"num_attention_heads": 96, "vocab_size": 50272, "word_embed_proj_dim": 12288},
        **{"max_position_embeddings": 2048},
    },
    "facebook/opt-350m": {
        **{"model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096},
        **{"num_attention_heads": 16, "vocab_size": 50272, "word_embed_proj_dim": 512},
        **{"max_position_embeddings": 2048, "do_layer_norm_before": False},
    },
    "tiiuae/falcon-7b": {
        **{"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "bias": False},
        **{"num_attention_heads": 71, "vocab_size": 65024, "multi_query": True},
        **{"parallel_attn": True, "new_decoder_architecture": False, "alibi": False},
    },
    "tiiuae/falcon-rw-1b": RW
    | {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32}
    | {"vocab_size": 50304, "parallel_attn": False},
    "tiiuae/falcon-11B": NEW
    | {"hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32}
    | {"vocab_size": 65024, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "tiiuae/falcon-180B": NEW
    | {"hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232}
    | {"vocab_size": 65024},
    "microsoft/Phi-4-mini-instruct": {
        **{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32},
        **{"vocab_size": 200064, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    },
}


@pytest.mark.parametrize("repo", PUBLISHED)
def test_published_model(repo: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = PUBLISHED[repo]
    theirs = AutoConfig.for_model(**config | {"pad_token_id": None, "dtype": "float16"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    ours = expected_layout(read_config(config))
    assert {name: spec.shape for name, spec in ours.items()} == shapes
