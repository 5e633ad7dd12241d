"""Rotary position embeddings, with the scaling of Llama 3.1 and the older linear one.

Source: RoFormer (arXiv 2104.09864); the "llama3" rule is Meta's, as in transformers'
`modeling_rope_utils`. Pairs are (i, i + dim / 2), the convention of Hugging Face checkpoints.
"""

import math

import torch
from torch import Tensor

from petalnode.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Return the angle per position of each pair, float32 [dim / 2]."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    freqs = 1.0 / (rope.base**exponents)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        return _llama3(freqs, rope)
    return freqs


def _llama3(freqs: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend in between."""
    wavelengths = 2 * math.pi / freqs
    turns = rope.original_max_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * freqs / rope.factor + blend * freqs


def angles(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine for `rotate_`, each [T, 1, dim], for positions [T].

    The sine is negated in the first half, which saves the negation in every block.
    """
    turned = torch.outer(positions.to(inverse.dtype), inverse)
    cos, sin = turned.cos().to(dtype), turned.sin().to(dtype)
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads x [T, heads, dim] in place by the `angles` of their tokens."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)
