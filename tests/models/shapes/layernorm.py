"""Families with layer norms: BLOOM, OPT, Falcon. Their keys have names of their own.

Random ones easily say the same few words for ever; `seed`s are of some that do not.
"""

from typing import Any

VOCAB: dict[str, Any] = {"vocab_size": 301, "bos_token_id": 0, "eos_token_id": 1}

BLOOM: dict[str, Any] = VOCAB | {"hidden_size": 48, "n_layer": 3, "n_head": 4}

OPT: dict[str, Any] = VOCAB | {
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 152,
}
OPT_350M: dict[str, Any] = OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}

FALCON: dict[str, Any] = VOCAB | {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
FALCON_40B: dict[str, Any] = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW: dict[str, Any] = FALCON | {
    **{"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
}

LAYER_NORMED: dict[str, dict[str, dict[str, Any]]] = {
    "bloom": {
        "four heads": BLOOM | {"vocab_size": 701, "seed": 2},
        "eleven heads, not a power of two": BLOOM | {"n_head": 11, "hidden_size": 55, "seed": 4},
        "residual after the norm, one head": BLOOM
        | {"apply_residual_connection_post_layernorm": True, "n_head": 1, "n_layer": 2, "seed": 1},
        "untied, odd head": BLOOM
        | {"tie_word_embeddings": False, "hidden_size": 21, "n_head": 3, "n_layer": 4, "seed": 2},
    },
    "opt": {
        "norms first": OPT,
        "350M: norms last, projected embeddings": OPT_350M,
        "Galactica: no biases, GELU, bare norms": OPT
        | {"enable_bias": False, "activation_function": "gelu"}
        | {"layer_norm_elementwise_affine": False, "num_hidden_layers": 2},
        "no final norm, untied, odd head": OPT
        | {"_remove_final_layer_norm": True, "tie_word_embeddings": False}
        | {"hidden_size": 33, "num_attention_heads": 3, "activation_function": "gelu_new"}
        | {"num_hidden_layers": 2},
    },
    "falcon": {
        "7B: one key head": FALCON,
        "40B: new decoder, two norms": FALCON_40B | {"seed": 2},
        "11B: new decoder, one norm, untied": FALCON_40B
        | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "ffn_hidden_size": 90}
        | {"num_kv_heads": 3, "rope_theta": 500042.0},
        "RW: sequential, biases, ALiBi": FALCON_RW,
        "RW, parallel, seven heads, odd head": FALCON_RW
        | {"parallel_attn": True, "num_attention_heads": 7, "hidden_size": 49, "seed": 2},
        "7B with biases and ALiBi": FALCON
        | {"alibi": True, "bias": True, "num_hidden_layers": 2, "seed": 4},
    },
}
