"""Rotary position embeddings as a config.json describes them, checked. No torch.

Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before). The formulas
are in `petalnode.models.layers.rope`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petalnode.errors import ModelError
from petalnode.models.config import MAX_POSITIONS, ConfigReader, invalid

ROPE_TYPES = ("default", "linear", "llama3")
MAX_ROPE_NUMBER = 1e12


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `base` and how its frequencies are scaled for longer contexts.

    The first `dim` numbers of each head turn, the others stay. `factor` divides the frequencies
    ("linear": all; "llama3": the low ones); the three behind it are used by "llama3" only.
    """

    dim: int
    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def read_rope(
    config: Mapping[str, Any], head_dim: int, *, kinds: tuple[str, ...] = ROPE_TYPES
) -> RopeConfig:
    """Return the rotary embedding of a parsed config.json. Raises `ModelError`."""
    merged: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if scaling is None:
            continue
        if not isinstance(scaling, Mapping):
            raise invalid(key, scaling, "an object")
        merged |= {k: v for k, v in scaling.items() if v is not None}
    merged.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return rope_from(merged, head_dim, kinds=kinds)


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
    factor = read.number("factor", 0.0, MAX_ROPE_NUMBER)
    if kind == "linear":
        return RopeConfig(dim, base, kind, factor)
    return _llama3(read, RopeConfig(dim, base, str(kind), factor))


def _llama3(read: ConfigReader, rope: RopeConfig) -> RopeConfig:
    low = read.number("low_freq_factor", 0.0, MAX_ROPE_NUMBER)
    high = read.number("high_freq_factor", 0.0, MAX_ROPE_NUMBER)
    if high <= low:
        raise invalid("rope high_freq_factor", high, f"above low_freq_factor, {low:g}")
    original = read.size("original_max_position_embeddings", MAX_POSITIONS)
    return RopeConfig(rope.dim, rope.base, rope.kind, rope.factor, low, high, original)
