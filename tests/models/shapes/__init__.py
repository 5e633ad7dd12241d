"""Odd shapes of tiny checkpoints by family: {family: {shape: transformers' configuration}}."""

from typing import Any

from .gemma import GEMMA
from .layernorm import LAYER_NORMED
from .llama_like import LLAMA_LIKE
from .moe import MOE
from .phi3 import PHI3

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    **LLAMA_LIKE,
    **GEMMA,
    **MOE,
    **LAYER_NORMED,
    **PHI3,
}
