"""Phi-3 and Phi-4: fused matrices, windows, partial rotation, LongRoPE."""

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Return the rotary scaling of a longer context than the original one, 160 tokens."""
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [2.0 + 3.0 * i for i in range(pairs)]
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long} | more
    return {"original_max_position_embeddings": 160, "rope_scaling": scaling}


PHI3: dict[str, dict[str, dict[str, Any]]] = {
    "phi3": {
        "4k: no sharing, a window shorter than the prompt": BASE
        | {"num_key_value_heads": 4, "sliding_window": 23},
        "128k: LongRoPE": BASE | {"hidden_size": 64} | longrope(8),
        "Phi-4-mini: LongRoPE of part of each head, tied": BASE
        | {"hidden_size": 64, "num_hidden_layers": 2}
        | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}
        | longrope(6, attention_factor=1.25),
        "odd number of pairs, one key head, window": BASE
        | {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1}
        | {"partial_rotary_factor": 0.6, "sliding_window": 64, "rope_theta": 250000.0},
    },
}
