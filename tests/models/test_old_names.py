"""Checkpoints as first published: tensors named as their repos on the hub name them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnode.errors import ModelError
from petalnode.models.checkpoint import open_checkpoint

from ..checkpoints import MakeCheckpoint
from .parity import prompt
from .reference import Local
from .shapes import SHAPES

FIRST = {family: next(iter(SHAPES[family].values())) for family in ("bloom", "opt", "falcon")}
SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "bigscience/bloom": ("bloom", lambda name: name.removeprefix("transformer.")),
    "tiiuae/falcon without its root": ("falcon", lambda name: name.removeprefix("transformer.")),
    "facebook/opt": ("opt", lambda name: name.removeprefix("model.")),
}


def rewrite(path: Path, to: Path, rename: Callable[[str], str], *more: str) -> Path:
    """Copy a checkpoint with its tensors renamed, and with `more` that carry nothing."""
    shutil.copytree(path, to)
    tensors = load_file(path / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert any(name not in tensors for name in renamed) or more
    extra = {name: torch.ones(1) for name in more}
    save_file(renamed | extra, to / "model.safetensors", metadata={"format": "pt"})
    return to


def logits(path: Path) -> torch.Tensor:
    local = Local(path)
    return local.step([local.row()], [prompt(20, local.checkpoint.config.vocab_size)])


@pytest.mark.parametrize("repo", SPELLINGS)
def test_names_of_the_hub(tiny_checkpoint: MakeCheckpoint, tmp_path: Path, repo: str) -> None:
    family, rename = SPELLINGS[repo]
    path = tiny_checkpoint(family=family, **FIRST[family])
    assert logits(rewrite(path, tmp_path / "old", rename)).equal(logits(path))


@pytest.mark.parametrize(
    ("family", "name"),
    [("falcon", "lm_head.weight"), ("opt", "lm_head.weight"), ("opt", "decoder.version")],
)
def test_tensors_that_carry_nothing(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, name: str
) -> None:
    """A tied head is stored twice by some; OPT's first exports hold a version number."""
    path = tiny_checkpoint(family=family, **FIRST[family])
    more = rewrite(path, tmp_path / "more", lambda name: name, name)
    assert logits(more).equal(logits(path))


def test_keys_of_the_hub(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """bloom-560m's config.json: n_embed, num_attention_heads, n_layer."""
    path = tiny_checkpoint(family="bloom", **FIRST["bloom"])
    shutil.copytree(path, tmp_path / "old")
    config = json.loads((path / "config.json").read_text())
    config["n_embed"], config["num_attention_heads"] = (
        config.pop("hidden_size"),
        config.pop("n_head"),
    )
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    assert logits(tmp_path / "old").equal(logits(path))


def test_a_tensor_of_another_model(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tiny_checkpoint(family="opt", **FIRST["opt"])
    stray = "decoder.layers.7.fc1.weight"
    wrong = rewrite(path, tmp_path / "wrong", lambda name: name.removeprefix("model."), stray)
    with pytest.raises(ModelError, match="unknown to its config"):
        open_checkpoint(str(wrong))
