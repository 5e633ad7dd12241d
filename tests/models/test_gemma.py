"""Gemma: its files' other names, what lies beside the text model, and half precision."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnode.errors import ModelError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.layers.weights import TorchParts

from ..checkpoints import MakeCheckpoint
from . import parity
from .reference import Local, load_reference
from .shapes.gemma import GEMMA

IDS = parity.prompt(40, 301)
FILE = "model.safetensors"


def rewritten(path: Path, to: Path, rename: Callable[[str], str | None]) -> Path:
    """Copy a checkpoint with its tensors renamed; None leaves a tensor out."""
    shutil.copytree(path, to)
    pairs = [(rename(name), tensor) for name, tensor in load_file(path / FILE).items()]
    save_file({name: tensor for name, tensor in pairs if name is not None}, to / FILE)
    return to


def logits(path: Path) -> torch.Tensor:
    local = Local(path)
    return local.step([local.row()], [IDS])


def newer(name: str) -> str:
    """The names that transformers 5 has in memory, and that some exporters write."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return "model." + name


@pytest.mark.parametrize("shape", ["linear, tied", "untied"])
def test_both_spellings_of_a_model_with_a_tower(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path, shape: str
) -> None:
    path = tiny_checkpoint(family="gemma3", **GEMMA["gemma3"][shape])
    names = set(load_file(path / FILE))
    assert {name.split(".")[0] for name in names} == {
        *("language_model", "vision_tower", "multi_modal_projector")
    }
    other = rewritten(path, tmp_path / "newer", newer)
    assert "model.language_model.norm.weight" in load_file(other / FILE)
    assert torch.equal(logits(other), logits(path))


def test_the_text_model_alone(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The tower may be missing, and a text_config may stand as config.json."""
    path = tiny_checkpoint(family="gemma3", **GEMMA["gemma3"]["linear, tied"])

    def text_only(name: str) -> str | None:
        inner = name.removeprefix("language_model.")
        return None if inner == name or inner.startswith("lm_head") else inner

    alone = rewritten(path, tmp_path / "alone", text_only)
    expected = logits(path)
    assert torch.equal(logits(alone), expected)
    text = json.loads((path / "config.json").read_text())["text_config"]
    (alone / "config.json").write_text(json.dumps(text))
    assert torch.equal(logits(alone), expected)


def test_tensors_that_belong_to_nothing_are_refused(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = tiny_checkpoint(family="gemma3", **GEMMA["gemma3"]["untied"])
    odd = rewritten(path, tmp_path / "odd", lambda name: name.replace("vision_", "hearing_"))
    with pytest.raises(ModelError, match=r"hearing_tower.*unknown"):
        open_checkpoint(str(odd))
    headless = rewritten(
        path, tmp_path / "headless", lambda name: None if "lm_head" in name else name
    )
    with pytest.raises(ModelError, match=r"lacks the tensor 'lm_head\.weight'"):
        open_checkpoint(str(headless))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_are_scaled_as_in_training(tiny_checkpoint: MakeCheckpoint, dtype: str) -> None:
    """By a root that is rounded to the dtype: the root of 54 is not a bfloat16."""
    path = tiny_checkpoint(family="gemma2", **GEMMA["gemma2"]["odd sizes, five blocks"])
    theirs = load_reference(path, dtype).model.embed_tokens(torch.tensor(IDS))
    ours = Local(path, dtype=dtype).client.embed(torch.tensor(IDS), torch.arange(len(IDS)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_without_their_one(dtype: torch.dtype) -> None:
    """Computed and multiplied in float32; the result is rounded once, as in transformers."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    generator = torch.Generator().manual_seed(3)
    x = (100 * torch.randn((40, 96), generator=generator)).to(dtype)
    weight = torch.randn(96, generator=generator).to(dtype)
    theirs = Gemma2RMSNorm(96, 1e-6).to(dtype)
    theirs.weight.data.copy_(weight)
    parts = TorchParts(dtype, torch.device("cpu"))
    ours = parts.rms_norm("norm", 96, 1e-6, plus_one=True)
    parts.targets["norm.weight"](weight)
    assert ours(x).dtype == dtype
    difference = (ours(x).float() - theirs(x).detach().float()).abs()
    if dtype == torch.float32:
        assert float(difference.max()) < 1e-5
    else:  # float32 sums in another order may fall on the other side of a rounding
        assert float((difference > 0).float().mean()) < 0.002


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gemma2", "grouped, tied"),
        ("gemma2", "odd sizes, five blocks"),
        ("gemma3_text", "two bases, linear"),
    ],
)
def test_float16(tiny_checkpoint: MakeCheckpoint, family: str, shape: str) -> None:
    path = tiny_checkpoint(family=family, **GEMMA[family][shape])
    exact, theirs = load_reference(path), load_reference(path, "float16")
    ours, allowed = parity.half_error(path, exact, theirs, "float16")
    assert 0 < ours < 1.25 * allowed
