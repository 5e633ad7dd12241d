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

LLAMA_LIKE: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "grouped": BASE,
        "multi-query, tied": BASE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "biases, odd head": BASE
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "hidden_size": 66}
        | {"num_attention_heads": 6, "num_key_value_heads": 3},
    },
}
