"""Families with experts: how many, how many a token, windows, dense blocks among them, sinks.

transformers' products of experts on a CPU want sizes that are multiples of eight; test_moe.py has
others.
"""

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}
QWEN = BASE | {"num_experts": 7, "moe_intermediate_size": 24, "head_dim": 12}
GPT_OSS = BASE | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 13}

MOE: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {
        "8 experts, grouped": BASE | {"num_local_experts": 8, "num_hidden_layers": 2},
        "3 of 5, window, tied": BASE
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 13}
        | {"tie_word_embeddings": True, "num_key_value_heads": 1, "num_hidden_layers": 2},
        "one of 3, odd sizes": BASE
        | {"num_local_experts": 3, "num_experts_per_tok": 1, "num_hidden_layers": 2}
        | {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 10},
    },
    "qwen3_moe": {
        "all blocks sparse": QWEN | {"norm_topk_prob": True},
        "every other block, one dense, tied": QWEN
        | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
        | {"tie_word_embeddings": True},
        "window, biases, all chosen": QWEN
        | {"use_sliding_window": True, "sliding_window": 13, "attention_bias": True}
        | {"num_experts": 3, "num_experts_per_tok": 3, "num_key_value_heads": 1},
    },
    "gpt_oss": {
        "alternating windows, yarn": GPT_OSS,
        "given windows, one key head": GPT_OSS
        | {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
        | {"num_key_value_heads": 1, "num_local_experts": 9, "num_experts_per_tok": 3},
        "no biases, odd sizes, default rope": GPT_OSS
        | {"attention_bias": False, "intermediate_size": 24, "num_hidden_layers": 2}
        | {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        | {"tie_word_embeddings": True},
    },
}
