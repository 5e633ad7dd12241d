"""Tensors of adapters that are refused: of other models, damaged, or more than is added here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnode.errors import ModelError, UsageError
from petalnode.models.tuning import peft_files
from petalnode.models.tuning.peft_files import WEIGHTS, Adapter, load_adapter, save_adapter
from petalnode.models.tuning.tuning import NOTHING

from .saved_adapters import (
    KEY,
    KINDS,
    Change,
    configure,
    damage,
    message,
    rewrite_header,
    save_lora,
)
from .test_tuning import LLAMA, config_of
from .tuned_reference import noise


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a LoRA."""
    return save_lora(tmp_path)


A, B = torch.ones(3, 48), torch.ones(48, 3)
TENSORS: dict[str, tuple[Change, str]] = {
    "no module of the model": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 48)}),
        "no module 'lm_head'",
    ),
    "no site": (
        lambda t: t.update({KEY.format(0, "A").replace("q_proj", "qkv"): torch.zeros(3, 48)}),
        "no module 'self_attn.qkv'",
    ),
    "too many blocks": (
        lambda t: t.update({KEY.format(3, "A"): torch.zeros(3, 48)}),
        "a block 3, but the model has 3 blocks",
    ),
    "an absurd block": (
        lambda t: t.update({KEY.format("9" * 40, "A"): torch.zeros(3, 48)}),
        "no module",
    ),
    "one matrix of two": (lambda t: t.pop(KEY.format(1, "B")), "one of two matrices"),
    "one matrix of two names": (
        lambda t: t.update({KEY.format(1, "A").replace(".weight", ".default.weight"): A}),
        "one matrix twice, the second as 'base_model.model.model.layers.1.self_attn.q_proj.lora_A",
    ),
    "one block of two names": (
        lambda t: t.update({KEY.format("01", "A"): A, KEY.format("01", "B"): B}),
        "one matrix twice",
    ),
    "another model's size": (
        lambda t: t.update({KEY.format(1, "A"): torch.zeros(3, 64)}),
        "[3, 64] and [48, 3], but the layer takes 48 numbers and gives 48",
    ),
    "two ranks": (
        lambda t: t.update({KEY.format(1, "A"): torch.zeros(5, 48)}),
        "matrices of two ranks for self_attn.q_proj in block 1: A of 5, B of 3",
    ),
    "another rank": (
        lambda t: t.update(
            {KEY.format(1, "A"): torch.zeros(5, 48), KEY.format(1, "B"): torch.zeros(48, 5)}
        ),
        "the rank 5 for self_attn.q_proj in block 1",
    ),
    "a magnitude": (
        lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.zeros(3)}),
        "lora_magnitude_vector",
    ),
    "integers": (
        lambda t: t.update({KEY.format(1, "A"): torch.zeros(3, 48, dtype=torch.int64)}),
        "the dtype I64",
    ),
    "nothing": (lambda t: t.clear(), "is empty"),
    "infinity": (lambda t: t[KEY.format(1, "B")].fill_(float("inf")), "not finite"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(saved: Path, case: str) -> None:
    change, words = TENSORS[case]
    damage(saved, change)
    assert words in message(saved)


def test_headers_of_other_blocks_are_checked_too(saved: Path) -> None:
    damage(saved, lambda t: t.update({KEY.format(0, "A"): torch.zeros(3, 64)}))
    with pytest.raises(UsageError, match=r"\[3, 64\] and \[48, 3\]"):
        load_adapter(saved, LLAMA, (1, 2))


def test_headers_are_checked_before_anything_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(peft_files, "safe_open", never)
    raw = (saved / WEIGHTS).read_bytes()
    huge = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40, 48], "data_offsets": [0, 4]}})
    for bad, words in (
        (raw[:-4], "truncated"),
        (raw[:6], "ends inside its own header"),
        (len(huge).to_bytes(8, "little") + huge.encode() + b"0000", "wrongly"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):
        (saved / WEIGHTS).write_bytes(bad)
        assert words in message(saved, kind=ModelError)


def overlap(header: dict[str, Any]) -> None:
    """All sizes and their sum are right."""
    first, second = (header[KEY.format(index, "A")] for index in (0, 1))
    first["data_offsets"] = second["data_offsets"]


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_headers_that_only_safetensors_sees_through(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mine"
    save_adapter(place, KINDS[kind], LLAMA, "base")
    rewrite_header(place, lambda header: header.update(__metadata__={"format": 1}))
    told = message(place, kind=ModelError)
    assert "is damaged or truncated: safetensors says" in told
    if kind == "lora":
        save_adapter(place, KINDS[kind], LLAMA, "base")
        rewrite_header(place, overlap)
        assert "safetensors says" in message(place, kind=ModelError)


PROMPTS: dict[str, tuple[str, dict[str, Any], Change, str]] = {
    "another model's width": ("prompt", {"token_dim": 64}, lambda t: None, "token_dim = 64"),
    "a width without end": (
        "prompt",
        {"token_dim": "y" * 500_000},
        lambda t: None,
        "but the model has 48",
    ),
    "another model's depth": ("deep-prompt", {"num_layers": 4}, lambda t: None, "num_layers = 4"),
    "no number of tokens": (
        "prompt",
        {"num_virtual_tokens": None},
        lambda t: None,
        "num_virtual_tokens = None",
    ),
    "no tokens": (
        "prompt",
        {"num_virtual_tokens": 0},
        lambda t: t["prompt_embeddings"].resize_(0, 48),
        "num_virtual_tokens = 0",
    ),
    "more tokens than the context": (
        "prompt",
        {"num_virtual_tokens": 512},
        lambda t: None,
        "num_virtual_tokens = 512",
    ),
    "another number of tokens": (
        "prompt",
        {"num_virtual_tokens": 4},
        lambda t: None,
        "shape [5, 48] instead of [4, 48]",
    ),
    "a prompt of a block in peft's files": (
        "prompt",
        {},
        lambda t: t.update({"blocks.0.prompt": torch.zeros(5, 48)}),
        "'blocks.0.prompt'",
    ),
    "a block too many": (
        "deep-prompt",
        {},
        lambda t: t.update({"blocks.3.prompt": torch.zeros(5, 48)}),
        "'blocks.3.prompt'",
    ),
    "an odd one": (
        "deep-prompt",
        {},
        lambda t: t.update({"blocks.1.prompt": torch.zeros(6, 48)}),
        "[6, 48] instead of [5, 48]",
    ),
    "NaN": (
        "prompt",
        {},
        lambda t: t["prompt_embeddings"].fill_(float("nan")),
        "not finite",
    ),
    "nothing": ("deep-prompt", {}, lambda t: t.clear(), "is empty"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_refused(tmp_path: Path, case: str) -> None:
    kind, keys, change, words = PROMPTS[case]
    save_adapter(tmp_path / "mine", KINDS[kind], LLAMA, "base")
    configure(tmp_path / "mine", **keys)
    damage(tmp_path / "mine", change)
    assert words in message(tmp_path / "mine")


def test_prompts_that_say_no_sizes(tmp_path: Path) -> None:
    """As peft's do that were never around a model."""
    save_adapter(tmp_path, KINDS["prompt"], LLAMA, "base")
    configure(tmp_path, token_dim=None, num_layers=None)
    assert load_adapter(tmp_path, LLAMA).kind == "prompt"


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_models_that_change_embeddings(tmp_path: Path, family: str) -> None:
    """A prompt of peft's is another thing there; ours is saved as ours."""
    config = config_of(family)
    made = Adapter(NOTHING, noise(5, config.hidden_size, seed=9))
    save_adapter(tmp_path, made, config, "base")
    assert load_adapter(tmp_path, config).kind == "prompt"
    configure(tmp_path, peft_type="PROMPT_TUNING")
    assert f"which a {family} changes before" in message(tmp_path, config)
