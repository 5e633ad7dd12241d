"""Adapters in directories, and how tests damage them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnode.errors import PetalnodeError, UsageError
from petalnode.models.tuning.peft_files import CONFIG, WEIGHTS, Adapter, load_adapter, save_adapter
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, Tuning

from .test_tuning import LLAMA
from .tuned_reference import noise, some_tuning

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


def matrices() -> Tuning:
    blocks = some_tuning(LLAMA).blocks
    return Tuning({index: BlockTuning(block.lora) for index, block in blocks.items()})


def prompts(tokens: int = 5) -> Tuning:
    return Tuning({i: BlockTuning(prompt=noise(tokens, 48, seed=i)) for i in range(3)})


KINDS = {
    "lora": Adapter(matrices()),
    "prompt": Adapter(NOTHING, noise(5, 48, seed=9)),
    "deep-prompt": Adapter(prompts(), noise(5, 48, seed=9)),
}


def save_lora(directory: Path) -> Path:
    """Return a new directory `mine` with a LoRA in it."""
    save_adapter(directory / "mine", KINDS["lora"], LLAMA, "org/base")
    return directory / "mine"


def same(ours: Tuning, theirs: Tuning) -> bool:
    first, second = dict(ours.named()), dict(theirs.named())
    scales = [
        {
            (i, site): pair.scale
            for i, block in one.blocks.items()
            for site, pair in block.lora.items()
        }
        for one in (ours, theirs)
    ]
    equal = first.keys() == second.keys() and scales[0] == scales[1]
    return equal and all(torch.equal(first[name], second[name]) for name in first)


def message(place: Path, config: Any = LLAMA, kind: type[PetalnodeError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        load_adapter(place, config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600, "whatever the files hold"
    assert caught.value.remedy
    return str(caught.value)


def damage(place: Path, change: Change) -> None:
    tensors = load_file(place / WEIGHTS)
    change(tensors)
    save_file(tensors, place / WEIGHTS)


def rewrite_header(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the weights in place: the tensors' bytes stay as they are."""
    raw = (place / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (place / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def configure(place: Path, **keys: Any) -> None:
    settings = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(settings | keys))
