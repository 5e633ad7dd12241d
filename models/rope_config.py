"""Rotary position embeddings as a config.json describes them, checked. No torch.

Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before). The formulas
are in `petalnode.models.layers.rope`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from petalnode.errors import ModelError
from petalnode.models.config import MAX_POSITIONS, ConfigReader, invalid

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MAX_ROPE_NUMBER = 1e12


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `base` and how its frequencies are scaled for longer contexts.

    The first `dim` numbers of each head turn, the others stay. `factor` divides the frequencies
    ("linear": all; "llama3", "yarn": the low ones). Between "low" and "high", counted in turns over
    the original context, "llama3" blends; "yarn" does so between `beta_slow` and `beta_fast`, over
    whole pairs if it is to `truncate`. Cosines and sines are multiplied by `attention_factor`.
    "longrope" divides the frequency of each pair by one of `pair_factors`.
    """

    dim: int
    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    pair_factors: tuple[float, ...] = ()


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    kinds: tuple[str, ...] = ROPE_TYPES,
    partial: bool = False,
) -> RopeConfig:
    """Return the rotary embedding of a parsed config.json. Raises `ModelError`.

    As in transformers, `rope_scaling` replaces `rope_parameters`, and an original context that
    stands outside of them replaces theirs. `partial`: in this family only the first numbers of each
    head may turn.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(key) or {}
    if not isinstance(scaling, Mapping):
        raise invalid(key, scaling, "an object")
    merged = {k: v for k, v in scaling.items() if v is not None}
    for key in ("rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        merged.setdefault(key, config.get(key))
    if config.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    rope = rope_from(merged, head_dim, kinds=kinds)
    if rope.dim != head_dim and not partial:
        raise invalid("partial_rotary_factor", rope.dim / head_dim, "1, as in all of this family")
    return rope


def rope_from(
    merged: Mapping[str, Any], head_dim: int, *, kinds: tuple[str, ...] = ROPE_TYPES
) -> RopeConfig:
    """Return the rotary embedding of one flat object of transformers' rope parameters."""
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in kinds:
        raise ModelError(
            f"The rotary scaling {str(kind)[:60]!r} is not supported.",
            f"Supported: {', '.join(kinds)}.",
        )
    read = ConfigReader(merged, prefix="rope ")
    dim = int(head_dim * read.number("partial_rotary_factor", 0.0, 1.0, default=1.0))
    if dim < 2 or dim % 2:
        raise invalid("head_dim", head_dim, "even, because rotary embeddings turn pairs")
    base = read.number("rope_theta", 0.0, MAX_ROPE_NUMBER, default=10000.0)
    if kind == "default":
        return RopeConfig(dim, base)
    if kind == "longrope":
        return _longrope(read, RopeConfig(dim, base, kind))
    factor = read.number("factor", 0.0, MAX_ROPE_NUMBER)
    if kind == "linear":
        return RopeConfig(dim, base, kind, factor)
    if kind == "yarn":
        return _yarn(read, RopeConfig(dim, base, kind, factor))
    return _llama3(read, RopeConfig(dim, base, str(kind), factor))


def _llama3(read: ConfigReader, rope: RopeConfig) -> RopeConfig:
    low = read.number("low_freq_factor", 0.0, MAX_ROPE_NUMBER)
    high = read.number("high_freq_factor", 0.0, MAX_ROPE_NUMBER)
    if high <= low:
        raise invalid("rope high_freq_factor", high, f"above low_freq_factor, {low:g}")
    original = read.size("original_max_position_embeddings", MAX_POSITIONS)
    return RopeConfig(rope.dim, rope.base, rope.kind, rope.factor, low, high, original)


def _yarn(read: ConfigReader, rope: RopeConfig) -> RopeConfig:
    """See arXiv 2309.00071. Where the original context is not named, it is the model's own."""
    if rope.base <= 1.0:
        raise invalid("rope rope_theta", rope.base, "above 1 for the rotary scaling 'yarn'")
    own = read.optional_size("max_position_embeddings", MAX_POSITIONS)
    slow = read.number("beta_slow", 0.0, MAX_ROPE_NUMBER, default=1.0)
    fast = read.number("beta_fast", 0.0, MAX_ROPE_NUMBER, default=32.0)
    if fast < slow:
        raise invalid("rope beta_fast", fast, f"at least beta_slow, {slow:g}")
    given = read.optional_number("attention_factor", 0.0, MAX_ROPE_NUMBER)
    return replace(
        rope,
        original_max_positions=read.size("original_max_position_embeddings", MAX_POSITIONS, own),
        beta_fast=fast,
        beta_slow=slow,
        truncate=read.flag("truncate", True),
        attention_factor=_yarn_attention(read, rope.factor) if given is None else given,
    )


def _yarn_attention(read: ConfigReader, factor: float) -> float:
    """Return 0.1 ln(factor) + 1, or DeepSeek's quotient of two such terms where both are given."""
    numerator = read.optional_number("mscale", 0.0, MAX_ROPE_NUMBER)
    denominator = read.optional_number("mscale_all_dim", 0.0, MAX_ROPE_NUMBER)
    if factor <= 1.0:
        return 1.0
    grown = 0.1 * math.log(factor)
    if numerator is None or denominator is None:
        return grown + 1.0
    return (grown * numerator + 1.0) / (grown * denominator + 1.0)


def _longrope(read: ConfigReader, rope: RopeConfig) -> RopeConfig:
    """See arXiv 2402.13753. Only the factors for texts up to the original context are read."""
    own = read.optional_size("max_position_embeddings", MAX_POSITIONS)
    original = read.size("original_max_position_embeddings", MAX_POSITIONS, own)
    short = read.config.get("short_factor")
    count = rope.dim // 2
    if not isinstance(short, list) or len(short) != count or not all(map(_is_factor, short)):
        raise invalid("rope short_factor", short, f"{count} numbers above 0")
    given = read.optional_number("attention_factor", 0.0, MAX_ROPE_NUMBER)
    factor = read.optional_number("factor", 0.0, MAX_ROPE_NUMBER) or (own or original) / original
    if given is None and factor > 1.0:
        if original == 1:
            raise invalid("rope original_max_position_embeddings", 1, "at least 2")
        given = math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        rope,
        original_max_positions=original,
        attention_factor=1.0 if given is None else given,
        pair_factors=tuple(map(float, short)),
    )


def _is_factor(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_ROPE_NUMBER  # type: ignore[operator]
