"""What an adapter_config.json says: PEFT's own keys, read with doubt, and written.

Formats: `LoraConfig` and `PromptTuningConfig` of the package peft. What would change the result and
is not built is refused, never ignored. No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from petalnode.errors import UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.families import family_of
from petalnode.models.tuning.check import check_rank, check_scale, is_number

LORA, PROMPT, OWN_PROMPT = "LORA", "PROMPT_TUNING", "PETALNODE_PROMPT"
"""Values of peft_type; the last is for prompts that peft has no files for."""
CHANGES_MORE = {
    **{"use_dora": "DoRA", "modules_to_save": "whole modules of its own", "lora_bias": "biases"},
    **{"trainable_token_indices": "embeddings", "target_parameters": "bare parameters"},
    **{"layer_replication": "replicated layers", "alora_invocation_tokens": "activated LoRA"},
    **{"use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow"},
    **{"kasa_config": "KaSA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA"},
    "megatron_config": "Megatron's parallel layers",
}
"""Keys that ask for more than low-rank matrices, in words."""
HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw the first matrices that leave the model's own weights alone."""
T = TypeVar("T")
PLAIN_PATTERN = re.compile(r"(?P<start>\^?)(?P<key>(?:\w|\.|\\\.)+)\$?")


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scale by the module's full name; the first key that a name ends with counts."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return self.rank if (own := _by_name(self.ranks, module)) is None else own

    def scale_of(self, module: str) -> float:
        """Return what the product is multiplied with."""
        rank, own = self.rank_of(module), _by_name(self.alphas, module)
        alpha = self.alpha if own is None else own
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_name(values: Mapping[str, T], module: str) -> T | None:
    # One that begins with ^ is a full name.
    found = (value for key, value in values.items() if f".^.{module}".endswith("." + key))
    return next(found, None)


def read_lora(config: Mapping[str, Any], what: str) -> LoraSettings:
    """Return the settings of a LoRA. Raises `UsageError` for what is not built, or is damaged."""
    for key, meaning in CHANGES_MORE.items():
        if config.get(key):
            raise _refused(what, f"{meaning} ({key})")
    if config.get("bias") not in (None, "none"):
        raise _refused(what, f"biases (bias = {shown(config['bias'])})")
    start = config.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise _refused(what, f"changed weights of the model (init_lora_weights = {shown(start)})")
    ranks, alphas = (
        _patterns(config, "rank_pattern", what),
        _patterns(config, "alpha_pattern", what),
    )
    rslora = config.get("use_rslora") or False
    if type(rslora) is not bool:
        raise bad_value(what, "use_rslora", rslora)
    return LoraSettings(
        _rank(config.get("r"), "r", what),
        _number(config.get("lora_alpha"), "lora_alpha", what),
        {key: _rank(value, "rank_pattern", what) for key, value in ranks.items()},
        {key: _number(value, "alpha_pattern", what) for key, value in alphas.items()},
        rslora,
    )


def _refused(what: str, meaning: str) -> UsageError:
    return UsageError(
        f"{what} asks for {meaning}, and petalnode adds low-rank matrices only.",
        "Train one without, or merge it into the model's weights with peft.",
    )


def bad_value(what: str, key: str, value: object) -> UsageError:
    """Return the error for a value of adapter_config.json that cannot be."""
    return UsageError(
        f"{what} has {key} = {shown(value)} in its adapter_config.json.",
        "Use an undamaged adapter.",
    )


def shown(value: object) -> str:
    """Return a value of a stranger's for a sentence: in one line, of bounded length."""
    return repr(value)[:60]


def _rank(value: object, key: str, what: str) -> int:
    if type(value) is not int:
        raise bad_value(what, key, value)
    check_rank(value, what)
    return value


def _number(value: object, key: str, what: str) -> float:
    if not is_number(value):
        raise bad_value(what, key, value)
    check_scale(value, what)
    return value


def _patterns(config: Mapping[str, Any], key: str, what: str) -> dict[str, Any]:
    """Return the values by the ends of modules' names. Expressions of a stranger's do not run."""
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise bad_value(what, key, given)
    plain: dict[str, Any] = {}
    for pattern, value in given.items():
        match = PLAIN_PATTERN.fullmatch(pattern)
        if match is None:
            raise UsageError(
                f"{what} has the regular expression {shown(pattern)} in its {key}, "
                "and petalnode evaluates none of a stranger's.",
                "Write plain names of modules there, each with its value: q_proj, or "
                "layers.0.self_attn.q_proj.",
            )
        end = "^." * bool(match["start"]) + match["key"].replace("\\.", ".")
        plain.setdefault(end, value)
    return plain


def modules_of(config: ModelConfig) -> str:
    """Return what transformers' module names of a block begin with; {} is its index."""
    family = family_of(config)
    return family.modules or family.blocks


def lora_config(
    config: ModelConfig, ranks: Mapping[str, int], scales: Mapping[str, float], base_model: str
) -> dict[str, Any]:
    """Return the adapter_config.json of matrices for modules: ranks and scales by full name."""
    alphas = {name: _tidy(scales[name] * rank) for name, rank in ranks.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    return _common(LORA, base_model) | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "target_modules": _targets(config, sorted(ranks)),
        **{"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "use_rslora": False},
    }


def prompt_config(config: ModelConfig, kind: str, tokens: int, base_model: str) -> dict[str, Any]:
    """Return the adapter_config.json of prompts of so many tokens; `kind` is the peft_type."""
    return _common(kind, base_model) | {
        "num_virtual_tokens": tokens,
        "token_dim": config.hidden_size,
        "num_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_transformer_submodules": 1,
    }


def _common(kind: str, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }


def _usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _tidy(number: float) -> float:
    """Return alpha as it was given: the quotient alpha / rank times the rank may be a hair off."""
    whole = round(number)
    return whole if math.isclose(number, whole, rel_tol=1e-12) else number


def _targets(config: ModelConfig, names: Sequence[str]) -> list[str]:
    """Return PEFT's target_modules for exactly these modules.

    Sites alone where every block has the same ones. A model with towers for images has modules of
    the same names there: then, and where blocks differ, full names.
    """
    start = modules_of(config).removesuffix("{}.")
    blocks: dict[str, set[str]] = {}
    for name in names:
        index, site = name.removeprefix(start).split(".", 1)
        blocks.setdefault(index, set()).add(site)
    sites = next(iter(blocks.values()))
    everywhere = len(blocks) == config.num_blocks and all(one == sites for one in blocks.values())
    return sorted(sites) if everywhere and not family_of(config).apart else list(names)
