"""Families of Llama's kind: pre-norm or sandwiched RMS norms, rotary embeddings, gated."""

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

YARN = {
    **{"rope_type": "yarn", "rope_theta": 5000.0, "factor": 6.0},
    "original_max_position_embeddings": 64,
}

LLAMA_LIKE: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "grouped": BASE,
        "multi-query, tied": BASE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "biases, odd head": BASE
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "hidden_size": 66}
        | {"num_attention_heads": 6, "num_key_value_heads": 3},
        "yarn": BASE | {"rope_parameters": YARN},
    },
    "mistral": {
        "window, grouped": BASE | {"sliding_window": 24},
        "no window, odd head": BASE | {"sliding_window": None, "head_dim": 14},
        "tiny window, tied": BASE
        | {"sliding_window": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"num_hidden_layers": 2, "vocab_size": 257},
    },
    "qwen2": {
        "grouped, tied": BASE | {"tie_word_embeddings": True},
        "late windows": BASE
        | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
        | {"num_hidden_layers": 4, "num_key_value_heads": 4},
        "yarn, odd sizes": BASE
        | {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {
            "intermediate_size": 77,
            "rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7},
        },
    },
    "qwen3": {
        "head beyond the hidden size": BASE | {"head_dim": 32},
        "biases, windows, tied": BASE
        | {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 10}
        | {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 0}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "multi-query, yarn": BASE
        | {"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 5}
        | {"rope_parameters": YARN | {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}},
    },
}
