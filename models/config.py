"""What a model is, in petalnode's own words: `ModelConfig`, read from a Hugging Face config.json.

Each family (`petalnode.models.families`) extends it by what only that family has, and is the only
place that guesses the names that its configurations use. Every number is checked against a named
limit by `ConfigReader`, so that no later code has to doubt a size. No torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petalnode.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16")

MAX_BLOCKS = 4096
MAX_HIDDEN_SIZE = 1 << 17
MAX_VOCAB_SIZE = 1 << 23
MAX_POSITIONS = 1 << 27
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_EXPERTS = 1 << 12
MAX_EOS_IDS = 256

ACTIVATIONS = {
    **{"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
}
"""Ours (`petalnode.models.layers.parts.ACTIVATIONS`) by transformers' names."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model. Sizes are element counts, ids are token ids.

    Every block keeps keys and values of `num_kv_heads` heads of `head_dim` numbers for each token.
    """

    family: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: str


def invalid(key: str, value: object, wanted: str) -> ModelError:
    """Return the error for one bad value; `wanted` ends the sentence "it must be ..."."""
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return ModelError(
        f"config.json has {key} = {shown}, but it must be {wanted}.",
        "Use an unmodified checkpoint, or correct the file.",
    )


class ConfigReader:
    """Typed access to a parsed config.json; each method raises `ModelError` naming the key.

    A value of null is a missing one. `generation` is the parsed generation_config.json, the newer
    word on the ids that end a text.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> None:
        self.config, self.generation = config, generation or {}
        self._prefix = prefix

    def quantization(self, known: tuple[str, ...]) -> str | None:
        """Return how the weights are quantized in the files, or None where they are not."""
        given = self.config.get("quantization_config")
        if given is None:
            return None
        method = given.get("quant_method") if isinstance(given, Mapping) else given
        if method not in known:
            raise ModelError(
                f"The checkpoint's weights are quantized already ({str(method)[:60]!r}), "
                "in a way that petalnode does not read.",
                "Use the unquantized weights of the model: --quant quantizes them while loading.",
            )
        return str(method)

    def spelling(self, *keys: str) -> str:
        """Return which of several keys for one thing the file has, or the first if it has none."""
        have = [key for key in keys if self.config.get(key) is not None] or [keys[0]]
        for other in have[1:]:
            if self.config[other] != self.config[have[0]]:
                raise invalid(self._prefix + other, self.config[other], f"what {have[0]} is")
        return have[0]

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(
                f"config.json lacks {self._prefix}{key}.", "Use a complete, unmodified checkpoint."
            )
        return default

    def size(self, key: str, limit: int, default: int | None = None, least: int = 1) -> int:
        """Return a whole number in least..limit."""
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= limit:
            raise invalid(self._prefix + key, value, f"a whole number from {least} to {limit}")
        return value

    def optional_size(self, key: str, limit: int) -> int | None:
        """Return a whole number in 1..limit, or None where there is none."""
        return None if self.config.get(key) is None else self.size(key, limit)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite number above `low` and at most `high`."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not low < value <= high or not math.isfinite(value):
            raise invalid(self._prefix + key, value, f"a number above {low:g} and at most {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """Return a finite number above `low` and at most `high`, or None where there is none."""
        return None if self.config.get(key) is None else self.number(key, low, high)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise invalid(self._prefix + key, value, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the words allowed."""
        value = self._get(key, default)
        if value not in allowed:
            raise invalid(self._prefix + key, value, "one of " + ", ".join(allowed))
        return str(value)

    def activation(self, key: str, default: str | None = None) -> str:
        """Return our name of the activation that transformers' name stands for."""
        return ACTIVATIONS[self.choice(key, tuple(ACTIVATIONS), default)]

    def layer_types(self, num_blocks: int) -> tuple[str, ...] | None:
        """Return what transformers calls each block's attention, or None where it does not say."""
        value = self.config.get("layer_types")
        if value is None:
            return None
        known = ("full_attention", "sliding_attention")
        fits = isinstance(value, list) and len(value) == num_blocks
        if not fits or any(one not in known for one in value):
            raise invalid("layer_types", value, f"{num_blocks} of " + ", ".join(known))
        return tuple(value)

    def token_id(self, key: str, vocab: int) -> int | None:
        """Return a token id of the vocabulary, or None where there is none."""
        value = self.config.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < vocab:
            raise invalid(key, value, f"a token id below {vocab}")
        return value

    def eos_ids(self, vocab: int) -> tuple[int, ...]:
        """Return what ends a text: generation_config.json's word, then config.json's."""
        value = self.generation.get("eos_token_id")
        if value is None:
            value = self.config.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS_IDS:
            raise invalid("eos_token_id", ids, f"at most {MAX_EOS_IDS} ids")
        for one in ids:
            if type(one) is not int or not 0 <= one < vocab:
                raise invalid("eos_token_id", one, f"a token id below {vocab}")
        return tuple(ids)

    def dtype(self) -> str:
        """Return the dtype that the weights were saved in."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        if name not in DTYPES:
            raise invalid("torch_dtype", name, "one of " + ", ".join(DTYPES))
        return str(name)


def _check_common(read: ConfigReader) -> None:
    """Raise `ModelError` for what transformers does with any family and petalnode with none."""
    if not read.flag("is_causal", True):
        raise invalid("is_causal", False, "true for a model that writes text")
    if read.config.get("per_layer_config"):
        wanted = "missing, because petalnode builds all blocks by the same sizes"
        raise invalid("per_layer_config", read.config["per_layer_config"], wanted)


def common_fields(
    read: ConfigReader,
    family: str,
    *,
    blocks: str = "num_hidden_layers",
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    kv_heads: str = "num_key_value_heads",
    positions: str = "max_position_embeddings",
    default_head_dim: int | None = None,
    whole_heads: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """Return the fields of `ModelConfig`; the keywords name a family's own keys and defaults.

    `whole_heads`: all heads together must be as wide as the hidden state.
    """
    _check_common(read)
    hidden_size = read.size(hidden, MAX_HIDDEN_SIZE)
    num_heads = read.size(heads, MAX_HEADS)
    num_kv_heads = read.size(kv_heads, MAX_HEADS, default=num_heads)
    vocab = read.size("vocab_size", MAX_VOCAB_SIZE)
    if num_heads % num_kv_heads:
        raise invalid(kv_heads, num_kv_heads, f"a divisor of the {num_heads} heads")
    if hidden_size < num_heads:
        raise invalid(heads, num_heads, f"at most {hidden}, {hidden_size}")
    share = hidden_size // num_heads
    head_dim = read.size("head_dim", MAX_HEAD_DIM, default=default_head_dim or share)
    if whole_heads and num_heads * head_dim != hidden_size:
        raise invalid(heads, num_heads, f"{hidden}, {hidden_size}, by head_dim, {head_dim}")
    return {
        "family": family,
        "num_blocks": read.size(blocks, MAX_BLOCKS),
        "hidden_size": hidden_size,
        "vocab_size": vocab,
        "max_positions": read.size(positions, MAX_POSITIONS, default=2048),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "tie_embeddings": read.flag("tie_word_embeddings", tied),
        "bos_id": read.token_id("bos_token_id", vocab),
        "eos_ids": read.eos_ids(vocab),
        "dtype": read.dtype(),
    }
