"""What an adapter_config.json says of a LoRA: what is understood, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from petalnode.errors import ModelError, UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.tuning.peft_config import (
    LoraSettings,
    lora_config,
    read_lora,
)
from petalnode.models.tuning.peft_files import CONFIG, load_adapter

from .saved_adapters import configure, message, save_lora
from .test_tuning import LLAMA, config_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a LoRA."""
    return save_lora(tmp_path)


def settings(**more: Any) -> LoraSettings:
    return read_lora({"r": 8, "lora_alpha": 16} | more, "The adapter x")


def test_ranks_and_scales_of_modules() -> None:
    """The first key that a module's name ends with, as peft has it."""
    one = settings(
        rank_pattern={"q_proj": 4, r"layers\.2\.self_attn\.v_proj": 2, "v_proj": 6, "^k_proj": 1},
        alpha_pattern={"self_attn.q_proj$": 2, "^model.layers.0.mlp.up_proj": 32.0},
    )
    name = "model.layers.{}.{}".format
    assert one.rank_of(name(0, "self_attn.q_proj")) == 4
    assert one.scale_of(name(0, "self_attn.q_proj")) == 0.5
    assert one.rank_of(name(2, "self_attn.v_proj")) == 2
    assert one.rank_of(name(12, "self_attn.v_proj")) == 6
    assert one.rank_of(name(0, "self_attn.k_proj")) == 8, "^ is the beginning of the whole name"
    assert one.scale_of(name(0, "mlp.up_proj")) == 4.0
    assert one.scale_of(name(1, "mlp.up_proj")) == 2.0
    assert one.rank_of(name(1, "mlp.xq_proj")) == 8, "whole words"
    assert settings(use_rslora=True).scale_of("x") == 16 / 8**0.5
    twice = settings(rank_pattern={"mlp.q": 4, r"mlp\.q": 2, "mlp.q$": 3})
    assert twice.rank_of("mlp.q") == 4


ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def modules(blocks: Sequence[int], sites: Sequence[str] = ATTENTION) -> list[str]:
    return [f"model.layers.{index}.{site}" for index in blocks for site in sites]


def written(names: Sequence[str], config: ModelConfig = LLAMA, **scales: float) -> dict[str, Any]:
    """Return the settings of matrices of rank 49, and of scale 1 / 49 but for `scales`."""
    ranks = dict.fromkeys(names, 49)
    return lora_config(config, ranks, dict.fromkeys(names, 1 / 49) | scales, "base")


def test_modules_that_are_named() -> None:
    """By their sites where all blocks have the same ones, else each by its full name."""
    assert written(modules(range(3)))["target_modules"] == list(ATTENTION)
    for names in (
        modules([0, 2]),
        [*modules([0, 1]), *modules([2], ATTENTION[:1])],
        [*modules([0], ATTENTION[:1]), *modules([1, 2])],
    ):
        assert written(names[::-1])["target_modules"] == names
    towers = config_of("gemma3", "untied")
    names = [f"model.language_{name}" for name in modules(range(towers.num_blocks), ATTENTION[:1])]
    assert written(names, towers)["target_modules"] == names, "a tower has modules of that name too"


def test_ranks_and_alphas_that_are_written() -> None:
    """What most modules have, and the others; an alpha as it was given, whole or not."""
    q, v, q_1, *rest = modules(range(3))
    assert 1 / 49 * 49 != 1
    made = written([q, v, q_1, *rest], **{v: 2.5 / 49, q_1: 1 / 49 + 1e-11})
    assert (made["r"], made["lora_alpha"], made["rank_pattern"]) == (49, 1, {})
    assert type(made["lora_alpha"]) is int
    assert made["alpha_pattern"] == {
        v: pytest.approx(2.5),
        q_1: pytest.approx(1 + 49e-11, abs=1e-12),
    }
    ranks = dict.fromkeys([q, v, q_1], 2) | {v: 3}
    made = lora_config(LLAMA, ranks, dict.fromkeys(ranks, 0.5), "base")
    assert (made["r"], made["rank_pattern"]) == (2, {v: 3})
    assert (made["lora_alpha"], made["alpha_pattern"]) == (1, {v: 1.5})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING'"),
    "no method": ({"peft_type": None}, "of the kind 'None'"),
    "a list of methods": ({"peft_type": ["LORA"]}, "of the kind"),
    "biases": ({"bias": "lora_only"}, "biases (bias = 'lora_only')"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changed weights"),
    "no rank": ({"r": None}, "r = None"),
    "a rank in words": ({"r": "8"}, "r = '8'"),
    "rank 0": ({"r": 0}, "rank 0"),
    "a huge rank": ({"r": 10**6}, "rank 1000000"),
    "another rank": ({"r": 8}, "rank 3 for mlp.down_proj in block 0, but its adapter_config"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha = None"),
    "an endless alpha": ({"lora_alpha": float("inf")}, "scale inf"),
    "an alpha too long for a float": ({"lora_alpha": 10**400}, "scale 1000000"),
    "an alpha that is none": ({"lora_alpha": float("nan")}, "scale nan"),
    "a rank that is no pattern": ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern = 'x'"),
    "an alpha of true": ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern = True"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern = ['q_proj']"),
    "a word for yes or no": ({"use_rslora": "false"}, "use_rslora = 'false'"),
}

EXPRESSIONS = ["(.*)*x", "(q|v)_proj", ".*layers\\.[0-3]\\..*q_proj", "q_proj|v_proj", ""]


MORE = {
    "use_dora": (True, "DoRA"),
    "lora_bias": (True, "biases"),
    "modules_to_save": (["lm_head"], "whole modules of its own"),
    "trainable_token_indices": ([3], "embeddings"),
    "target_parameters": (["experts.gate_up_proj"], "bare parameters"),
    "layer_replication": ([[0, 2], [1, 3]], "replicated layers"),
    "alora_invocation_tokens": ([1, 2], "activated LoRA"),
    "use_qalora": (True, "QALoRA"),
    "use_bdlora": ({"nblocks": 2}, "block-diagonal LoRA"),
    "arrow_config": ({"top_k": 3}, "Arrow"),
    "kasa_config": ({"beta": 1.0}, "KaSA"),
    "velora_config": ({"groups": 2}, "VeLoRA"),
    "monteclora_config": ({"samples": 2}, "MonteCLoRA"),
    "megatron_config": ({"tp": 2}, "Megatron's parallel layers"),
}


@pytest.mark.parametrize("key", MORE)
def test_what_is_more_than_matrices(key: str) -> None:
    """Is refused where it is asked for, and only there: peft writes all of its keys."""
    value, meaning = MORE[key]
    with pytest.raises(UsageError) as caught:
        settings(**{key: value})
    assert str(caught.value).startswith(f"The adapter x asks for {meaning} ({key}), and petalnode")
    assert settings(**{key: None}) == settings(**{key: False}) == settings()


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "orthogonal", "eva"])
def test_first_matrices_that_leave_the_model_alone(start: object) -> None:
    assert settings(init_lora_weights=start) == settings()


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(saved: Path, case: str) -> None:
    keys, words = REFUSED[case]
    configure(saved, **keys)
    told = message(saved)
    assert words in told
    assert told.startswith("The adapter mine ")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_that_are_not_evaluated(key: str, expression: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(**{key: {expression: 3}})
    told = f"has the regular expression {expression!r} in its {key}, and petalnode evaluates none"
    assert told in caught.value.cause
    assert "plain names of modules" in caught.value.remedy


def test_harmless_settings(saved: Path) -> None:
    configure(
        saved,
        **{"init_lora_weights": "gaussian", "lora_dropout": 0.3, "fan_in_fan_out": True},
        **{"modules_to_save": [], "bias": None, "use_rslora": None, "loftq_config": {}},
        **{"target_modules": "anything", "task_type": "SEQ_CLS", "base_model_name_or_path": 7},
        peft_version="9",
    )
    assert load_adapter(saved, LLAMA).base_model == ""


def test_a_config_that_is_none(saved: Path) -> None:
    for text, words in (("{", "not valid JSON"), ("[]", "JSON object"), (" " * (1 << 21), "bytes")):
        (saved / CONFIG).write_text(text)
        assert words in message(saved, kind=ModelError)
