"""What a model is, in petalnode's own words: `ModelConfig`, read from a Hugging Face config.json.

`ModelConfig.from_hf` is the only place that guesses the names that foreign configurations use.
Every number is checked against a named limit here, so that no later code has to doubt a size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petalnode.errors import ModelError

FAMILIES = ("llama",)
"""Values of `model_type` that petalnode runs."""
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16")

MAX_BLOCKS = 4096
MAX_HIDDEN_SIZE = 1 << 17
MAX_VOCAB_SIZE = 1 << 23
MAX_POSITIONS = 1 << 27
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_EOS_IDS = 256
MAX_ROPE_NUMBER = 1e12


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `base` and how its frequencies are scaled for longer contexts.

    `factor` divides the frequencies ("linear": all; "llama3": the low ones). The other three are
    used by "llama3" only, as in transformers' `_compute_llama3_parameters`.
    """

    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model of one of `FAMILIES`. Sizes are element counts, ids are token ids."""

    family: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a parsed config.json, and generation_config.json for the ids that end a text.

        Raises `ModelError` that names the key for a family or feature that petalnode does not run,
        and for every value that is missing, of a wrong type or out of its limits.
        """
        read = _Reader(config)
        family = _family(config)
        hidden = read.size("hidden_size", MAX_HIDDEN_SIZE)
        heads = read.size("num_attention_heads", MAX_HEADS)
        kv_heads = read.size("num_key_value_heads", MAX_HEADS, default=heads)
        vocab = read.size("vocab_size", MAX_VOCAB_SIZE)
        if heads % kv_heads:
            raise _invalid("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise _invalid("hidden_act", activation, "silu, as in every Llama")
        return cls(
            family=family,
            num_blocks=read.size("num_hidden_layers", MAX_BLOCKS),
            hidden_size=hidden,
            vocab_size=vocab,
            max_positions=read.size("max_position_embeddings", MAX_POSITIONS, default=2048),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(read, hidden, heads),
            intermediate_size=read.size("intermediate_size", MAX_INTERMEDIATE_SIZE),
            norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            rope=_rope(config),
            attention_bias=read.flag("attention_bias"),
            mlp_bias=read.flag("mlp_bias"),
            tie_embeddings=read.flag("tie_word_embeddings"),
            bos_id=_token_id(config, "bos_token_id", vocab),
            eos_ids=_eos_ids(config, generation or {}, vocab),
            dtype=_dtype(config),
        )


def _invalid(key: str, value: object, wanted: str) -> ModelError:
    """Return the error for one bad value; `wanted` ends the sentence "it must be ..."."""
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return ModelError(
        f"config.json has {key} = {shown}, but it must be {wanted}.",
        "Use an unmodified checkpoint, or correct the file.",
    )


class _Reader:
    """Typed access to a parsed config; each method raises `ModelError` naming the key."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config, self._prefix = config, prefix

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(
                f"config.json lacks {self._prefix}{key}.", "Use a complete, unmodified checkpoint."
            )
        return default

    def size(self, key: str, limit: int, default: int | None = None) -> int:
        """Return a whole number in 1..limit."""
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= limit:
            raise _invalid(self._prefix + key, value, f"a whole number from 1 to {limit}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite number above `low` and at most `high`."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not low < value <= high or not math.isfinite(value):
            raise _invalid(
                self._prefix + key, value, f"a number above {low:g} and at most {high:g}"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a boolean that is false by default."""
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise _invalid(self._prefix + key, value, "true or false")
        return value


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if family is None:
        raise ModelError("config.json lacks model_type.", "Use a Hugging Face model checkpoint.")
    if family not in FAMILIES:
        raise ModelError(
            f"The model family {str(family)[:60]!r} is not supported.",
            f"Supported families: {', '.join(FAMILIES)}.",
        )
    return str(family)


def _head_dim(read: _Reader, hidden: int, heads: int) -> int:
    if hidden // heads == 0:
        raise _invalid("num_attention_heads", heads, f"at most hidden_size, {hidden}")
    head_dim = read.size("head_dim", MAX_HEAD_DIM, default=hidden // heads)
    if head_dim % 2:
        raise _invalid("head_dim", head_dim, "even, because rotary embeddings turn pairs")
    return head_dim


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    merged: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if scaling is None:
            continue
        if not isinstance(scaling, Mapping):
            raise _invalid(key, scaling, "an object")
        merged |= {k: v for k, v in scaling.items() if v is not None}
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"The rotary scaling {str(kind)[:60]!r} is not supported.",
            f"Supported: {', '.join(ROPE_TYPES)}.",
        )
    partial = merged.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise _invalid("partial_rotary_factor", partial, "1, as in every Llama")
    return _rope_numbers(str(kind), _Reader(merged, "rope "))


def _rope_numbers(kind: str, read: _Reader) -> RopeConfig:
    base = read.number("rope_theta", 0.0, MAX_ROPE_NUMBER, default=10000.0)
    if kind == "default":
        return RopeConfig(base)
    factor = read.number("factor", 0.0, MAX_ROPE_NUMBER)
    if kind == "linear":
        return RopeConfig(base, kind, factor)
    low = read.number("low_freq_factor", 0.0, MAX_ROPE_NUMBER)
    high = read.number("high_freq_factor", 0.0, MAX_ROPE_NUMBER)
    if high <= low:
        raise _invalid("rope high_freq_factor", high, f"above low_freq_factor, {low:g}")
    original = read.size("original_max_position_embeddings", MAX_POSITIONS)
    return RopeConfig(base, kind, factor, low, high, original)


def _token_id(config: Mapping[str, Any], key: str, vocab: int) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocab:
        raise _invalid(key, value, f"a token id below {vocab}")
    return value


def _eos_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab: int
) -> tuple[int, ...]:
    """Return what ends a text: generation_config.json is the newer word, then config.json."""
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_IDS:
        raise _invalid("eos_token_id", ids, f"at most {MAX_EOS_IDS} ids")
    for one in ids:
        if type(one) is not int or not 0 <= one < vocab:
            raise _invalid("eos_token_id", one, f"a token id below {vocab}")
    return tuple(ids)


def _dtype(config: Mapping[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise _invalid("torch_dtype", name, "one of " + ", ".join(DTYPES))
    return str(name)
