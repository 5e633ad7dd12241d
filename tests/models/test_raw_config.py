"""A config.json as people write it means what transformers makes of it: by the logits.

The other parity tests let transformers write the file, which then has every key in one spelling.
Here keys are missing, null, or said twice.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_tiny

from .parity import TOLERANCE, difference, prompt
from .reference import Local, load_reference, reference_logits

SIZES: dict[str, Any] = {
    **{"vocab_size": 301, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PHI3 = SIZES | {"pad_token_id": None, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5] * 2, "long_factor": [2.0, 3.0] * 2}
GEMMA = SIZES | {"query_pre_attn_scalar": 9, "sliding_window": 13, "num_key_value_heads": 2}
BOTH = {"full_attention": LINEAR | {"rope_theta": 300.0}, "sliding_attention": LINEAR}
VISION = {
    **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_scaling replaces rope_parameters": (
        "mistral",
        SIZES | {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 700.0}},
    ),
    "of two scalings, one": (
        "qwen2",
        SIZES
        | {"rope_scaling": LINEAR, "rope_parameters": YARN, "rope_theta": 500.0}
        | {"num_key_value_heads": 2},
    ),
    "original context outside": (
        "qwen3",
        SIZES
        | {"num_key_value_heads": 4, "rope_parameters": YARN}
        | {"original_max_position_embeddings": 64},
    ),
    "mixtral: key heads by default": (
        "mixtral",
        SIZES | EXPERTS | {"num_attention_heads": 16},
    ),
    "mixtral: context by default": (
        "mixtral",
        SIZES | EXPERTS | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "qwen3_moe: key heads by default, null window": (
        "qwen3_moe",
        QWEN3_MOE | {"use_sliding_window": True, "sliding_window": None},
    ),
    "gpt_oss: key heads by default, null rope": (
        "gpt_oss",
        SIZES | EXPERTS | {"rope_parameters": None, "rope_theta": 5000, "num_attention_heads": 16},
    ),
    "phi3: context by default": ("phi3", PHI3 | {"rope_scaling": LONGROPE}),
    "phi3: rope_scaling replaces rope_parameters": (
        "phi3",
        PHI3 | {"rope_scaling": LONGROPE, "rope_parameters": {"rope_theta": 700.0}},
    ),
    "gemma3: rope_scaling on top of full_attention": (
        "gemma3_text",
        GEMMA | {"rope_scaling": YARN, "rope_parameters": BOTH, "sliding_window_pattern": 2},
    ),
    "gemma3: the inner word on tying does not count": (
        "gemma3",
        {
            "text_config": GEMMA | {"tie_word_embeddings": False},
            "vision_config": VISION,
            **{"mm_tokens_per_image": 4, "image_token_index": 300},
            **{"boi_token_index": 298, "eoi_token_index": 299},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, raw = CASES[case]
    text = json.dumps({"model_type": family} | raw)
    make_tiny(tmp_path, family=family, **deepcopy(raw))  # transformers changes what it gets
    (tmp_path / "config.json").write_text(text)
    ids, local = prompt(60, 301), Local(tmp_path)
    expected = reference_logits(load_reference(tmp_path), ids)
    assert difference(local.step([local.row()], [ids]), expected) < TOLERANCE
