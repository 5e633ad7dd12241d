"""Odd shapes of tiny checkpoints by family: {family: {shape: transformers' configuration}}."""

from typing import Any

from .llama_like import LLAMA_LIKE

SHAPES: dict[str, dict[str, dict[str, Any]]] = {**LLAMA_LIKE}
