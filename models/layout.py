"""Which tensors a checkpoint must hold, by name and shape, and what they take in memory. No torch.

Names are those of Hugging Face checkpoints. A block's tensors are named without the block's prefix;
`block_prefix` gives that.
"""

from petalnode.models.config import ModelConfig
from petalnode.models.families import family_of
from petalnode.models.layers.parts import Layout, ShapeParts

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
"""Endings of names that old exporters wrote although they are computed, not learned."""
HEAD = "lm_head.weight"


def block_prefix(config: ModelConfig, index: int) -> str:
    """Return what the names of block `index` begin with."""
    return family_of(config).blocks.format(index)


def block_layout(config: ModelConfig, index: int) -> Layout:
    """Return every tensor of block `index`."""
    parts = ShapeParts()
    family_of(config).block(parts, config, index)
    return parts.layout


def client_layout(config: ModelConfig) -> Layout:
    """Return what the client holds: embeddings, final norm, head."""
    parts = ShapeParts()
    family_of(config).client(parts, config)
    return parts.layout


def expected_layout(config: ModelConfig) -> Layout:
    """Return every tensor of the whole model, by its full name."""
    layout = client_layout(config)
    for index in range(config.num_blocks):
        prefix = block_prefix(config, index)
        layout |= {prefix + name: spec for name, spec in block_layout(config, index).items()}
    return layout


def is_ignored(config: ModelConfig, name: str) -> bool:
    """Return whether a tensor that `expected_layout` lacks is known to carry nothing."""
    family = family_of(config)
    if name.endswith(IGNORED_SUFFIXES + family.ignored) or name.startswith(family.apart):
        return True
    return config.tie_embeddings and name.endswith(HEAD)
