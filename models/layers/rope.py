"""Rotary position embeddings, and how they are scaled: linearly, as Llama 3.1, by YaRN.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071); the "llama3" rule is Meta's, as in
transformers' `modeling_rope_utils`. Pairs are (i, i + dim / 2), the convention of Hugging Face
checkpoints.
"""

import math

import torch
from torch import Tensor

from petalnode.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Return the angle per position of each pair, float32 [dim / 2]."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    freqs = 1.0 / (rope.base**exponents)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.pair_factors) * rope.base**exponents)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        return _llama3(freqs, rope)
    if rope.kind == "yarn":
        return _yarn(freqs, rope)
    return freqs


def _llama3(freqs: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend in between."""
    wavelengths = 2 * math.pi / freqs
    turns = rope.original_max_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * freqs / rope.factor + blend * freqs


def _yarn(freqs: Tensor, rope: RopeConfig) -> Tensor:
    """Divide the frequencies of late pairs by the factor, keep early ones, and blend in between."""
    first, last = _pair_that_turns(rope.beta_fast, rope), _pair_that_turns(rope.beta_slow, rope)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first or 0.001
    blend = ((torch.arange(rope.dim // 2) - first) / width).clamp(0.0, 1.0)
    return blend * freqs / rope.factor + (1 - blend) * freqs


def _pair_that_turns(times: float, rope: RopeConfig) -> float:
    """Return which pair, fractional, turns so many times over the original context."""
    wavelength = rope.original_max_positions / (times * 2 * math.pi)
    return rope.dim * math.log(wavelength) / (2 * math.log(rope.base))


def angles(
    positions: Tensor, inverse: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `scale` times cosine and signed sine, each [T, 1, dim], for positions [T].

    For `rotate_`: the sine is negated in the first half, which saves that in every block.
    """
    turned = torch.outer(positions.to(inverse.dtype), inverse)
    cos, sin = (turned.cos() * scale).to(dtype), (turned.sin() * scale).to(dtype)
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads x [T, heads, dim] in place by the `angles` of their tokens."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)
