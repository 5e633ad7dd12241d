"""Gemma 2 and 3: sandwiched norms, alternating windows, scaled embeddings, capped scores."""

from typing import Any

from .llama_like import BASE

SMALL = BASE | {
    **{"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 16},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
}
CAPPED = {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 9.0}
TINY_VISION = {
    **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}
WRAPPER = {
    "vision_config": TINY_VISION,
    **{"mm_tokens_per_image": 4, "image_token_index": 300},
    **{"boi_token_index": 298, "eoi_token_index": 299},
}
LOCAL, GLOBAL = {"rope_theta": 700.0}, {"rope_theta": 30000.0}
ROPES = {"sliding_attention": LOCAL | {"rope_type": "default"}}
LINEAR = GLOBAL | {"rope_type": "linear", "factor": 8.0}

GEMMA: dict[str, dict[str, dict[str, Any]]] = {
    "gemma2": {
        "grouped, tied": SMALL | CAPPED | {"tie_word_embeddings": True},
        "no caps, biases, all in one head": SMALL
        | {"num_key_value_heads": 1, "attention_bias": True, "head_dim": 20}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "odd sizes, five blocks": SMALL
        | CAPPED
        | {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 14}
        | {"num_hidden_layers": 5, "vocab_size": 307, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3},
    },
    "gemma3_text": {
        "pattern of two, tied": SMALL
        | {"sliding_window_pattern": 2, "tie_word_embeddings": True, "rope_theta": 5000.0}
        | {"rope_local_base_freq": 300.0},
        "two bases, linear": SMALL
        | {"num_hidden_layers": 7, "rope_parameters": ROPES | {"full_attention": LINEAR}}
        | {"num_key_value_heads": 4, "final_logit_softcapping": 7.0},
        "odd sizes, biases": SMALL
        | {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 18}
        | {"attention_bias": True, "sliding_window": 3}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    },
    "gemma3": {
        "linear, tied": WRAPPER
        | {
            "text_config": SMALL
            | {"tie_word_embeddings": True, "sliding_window_pattern": 2}
            | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        },
        "untied": WRAPPER
        | {
            "text_config": SMALL | {"sliding_window_pattern": 3, "num_key_value_heads": 1},
            "tie_word_embeddings": False,
        },
        "defaults of the larger ones": WRAPPER
        | {
            "text_config": {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 7}
            | {"vocab_size": 301, "sliding_window": 24, "query_pre_attn_scalar": 9}
            | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        },
    },
}
