"""Mistral: a Llama in which a token sees only a window of the tokens before it (arXiv 2310.06825).

The base of families with windows in all blocks or in some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petalnode.models.config import MAX_POSITIONS, ConfigReader, invalid
from petalnode.models.families.family import Family
from petalnode.models.families.llama import (
    SILU,
    LlamaConfig,
    PreNormBlock,
    llama_client,
    llama_fields,
)
from petalnode.models.layers.attention import Attention, Scores, projections
from petalnode.models.layers.mlp import GatedMlp
from petalnode.models.layers.parts import Parts

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
"""What a missing key means. A null is another value: no window."""


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(LlamaConfig):
    """A Llama with windows: how many tokens a token of each block sees, itself included."""

    windows: tuple[int | None, ...]


def read_mistral(read: ConfigReader) -> WindowedConfig:
    """Return the configuration of a Mistral checkpoint."""
    read = ConfigReader(DEFAULTS | dict(read.config), read.generation)
    read.choice("hidden_act", SILU, default="silu")
    fields = llama_fields(read, "mistral")
    slides = read.config["sliding_window"] is not None
    windows = read_windows(read, fields["num_blocks"], lambda index: slides)
    if slides and None in windows:
        wanted = "the same for all blocks, as in every Mistral"
        raise invalid("layer_types", read.config["layer_types"], wanted)
    return WindowedConfig(**fields, windows=windows)


def read_windows(
    read: ConfigReader, num_blocks: int, slides: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Return every block's window; `slides` says which have one where layer_types does not."""
    types = read.layer_types(num_blocks)
    if types is None:
        sliding = [slides(index) for index in range(num_blocks)]
    else:
        sliding = [one == "sliding_attention" for one in types]
    window = read.optional_size("sliding_window", MAX_POSITIONS)
    if window is None and any(sliding):
        raise invalid("sliding_window", None, "a number, because some blocks have a window")
    return tuple(window if one else None for one in sliding)


def mistral_block(parts: Parts, config: WindowedConfig, index: int) -> PreNormBlock:
    """Return block `index`."""
    scores = Scores(config.head_dim**-0.5, config.windows[index])
    qkv, out = projections(parts, config)
    attention = Attention(config, index, qkv, out, rope=config.rope, scores=scores)
    mlp = GatedMlp(parts, config.hidden_size, config.intermediate_size)
    return PreNormBlock(parts, config, attention, mlp)


MISTRAL = Family("mistral", read_mistral, mistral_block, llama_client)
