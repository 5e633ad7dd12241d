"""Adapters as files, without peft: what is written, and read again, whole or in parts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from petalnode.errors import UsageError
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.peft_files import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_block_bytes,
    load_adapter,
    save_adapter,
)
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning

from .saved_adapters import KEY, KINDS, damage, matrices, message, prompts, same, save_lora
from .test_tuning import LLAMA, config_of
from .tuned_reference import noise, some_tuning


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a LoRA."""
    return save_lora(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    made = KINDS[kind]
    place = tmp_path / "a" / "mine"
    save_adapter(place, made, LLAMA, "org/base")
    assert sorted(path.name for path in place.iterdir()) == [CONFIG, WEIGHTS]
    read = load_adapter(place, LLAMA)
    assert (read.kind, read.name, read.base_model) == (kind, "mine", "org/base")
    assert made.kind == kind
    assert same(read.tuning, made.tuning)
    assert (read.prompt is None) == (made.prompt is None)
    assert read.prompt is None or torch.equal(read.prompt, KINDS["prompt"].prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Are read as float32, the dtype that everything is added in."""
    save_adapter(tmp_path, KINDS[kind], LLAMA, "base")
    tensors = {name: one.to(dtype) for name, one in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    loaded, saved = load_adapter(tmp_path, LLAMA), KINDS[kind]
    read = dict(loaded.tuning.named())
    assert all(one.dtype == torch.float32 for one in read.values())
    for name, tensor in saved.tuning.named():
        assert torch.equal(read[name], tensor.to(dtype).float())
    if saved.prompt is not None:
        assert loaded.prompt is not None
        assert loaded.prompt.dtype == torch.float32
        assert torch.equal(loaded.prompt, saved.prompt.to(dtype).float())


@pytest.mark.parametrize("tokens", [1, 511])
def test_prompts_of_blocks_alone(tmp_path: Path, tokens: int) -> None:
    """As short, and as long, as they can be."""
    some = prompts(tokens).within(1, 2)
    made = Adapter(Tuning({**some.blocks, 2: BlockTuning()}))
    save_adapter(tmp_path, made, LLAMA, "base")
    read = load_adapter(tmp_path, LLAMA)
    assert read.prompt is None
    assert same(read.tuning, some)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_gets_at_most(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """In float32, as which it is loaded; known from the headers alone."""
    save_adapter(tmp_path, KINDS[kind], LLAMA, "org/base")
    tensors = {name: one.to(dtype) for name, one in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    loaded = [load_adapter(tmp_path, LLAMA, (index, index + 1)).tuning for index in range(3)]
    assert adapter_block_bytes(tmp_path, LLAMA) == max(one.nbytes for one in loaded)


def test_blocks_of_their_own_ranks_and_scales(tmp_path: Path) -> None:
    """Each module gets its own back; what a block takes at most is what the largest takes."""
    blocks = {}
    for index in range(3):
        made = new_lora(
            LLAMA,
            rank=(4, 8, 2)[index],
            alpha=index + 1.5,
            targets=["q_proj", "down_proj"],
            rng=torch.Generator().manual_seed(index),
        )
        blocks[index] = made.blocks[index]
    tuning = Tuning(blocks)
    save_adapter(tmp_path, Adapter(tuning), LLAMA, "base")
    assert same(load_adapter(tmp_path, LLAMA).tuning, tuning)
    assert adapter_block_bytes(tmp_path, LLAMA) == tuning.within(1, 2).nbytes


def test_only_some_blocks(saved: Path, tmp_path: Path) -> None:
    """Numbers of other blocks are not read: not even NaN there matters."""
    damage(saved, lambda tensors: tensors[KEY.format(0, "A")].fill_(float("nan")))
    part = load_adapter(saved, LLAMA, (1, 3)).tuning
    assert same(part, matrices().within(1, 3))
    with pytest.raises(UsageError, match="not finite"):
        load_adapter(saved, LLAMA)
    save_adapter(tmp_path / "deep", KINDS["deep-prompt"], LLAMA, "base")
    assert list(load_adapter(tmp_path / "deep", LLAMA, (2, 3)).tuning.blocks) == [2]


def test_tensors_of_an_optimizer(tmp_path: Path) -> None:
    """They may want gradients, and share memory."""
    flat = torch.cat([tensor.flatten() for _, tensor in matrices().named()]).requires_grad_()
    pieces = iter(flat.split([tensor.numel() for _, tensor in matrices().named()]))
    views = {name: next(pieces).view(one.shape) for name, one in matrices().named()}
    leaves = Tuning(
        {
            index: BlockTuning(
                {
                    site: LowRank(views[f"{index}.{site}.a"], views[f"{index}.{site}.b"], one.scale)
                    for site, one in block.lora.items()
                }
            )
            for index, block in matrices().blocks.items()
        }
    )
    save_adapter(tmp_path, Adapter(leaves), LLAMA, "base")
    assert same(load_adapter(tmp_path, LLAMA).tuning, matrices())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_matrix_of_many_blocks_turned_around(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is in the file is each block's own, in float32, row by row."""
    a, b = noise(48, 3, seed=1).to(dtype).T, noise(48, 3, seed=2).to(dtype)
    tied = Tuning({i: BlockTuning({"self_attn.q_proj": LowRank(a, b, 1.0)}) for i in range(3)})
    save_adapter(tmp_path, Adapter(tied), LLAMA, "base")
    assert same(load_adapter(tmp_path, LLAMA).tuning, tied.map(torch.Tensor.float))
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_what_peft_wants_in_the_files(saved: Path, tmp_path: Path) -> None:
    assert load_file(saved / WEIGHTS)[KEY.format(2, "A")].shape == (3, 48)
    for kind in ("prompt", "deep-prompt"):
        save_adapter(tmp_path / kind, KINDS[kind], LLAMA, "org/base")
    written = {
        kind: json.loads((tmp_path / place / CONFIG).read_text())
        for kind, place in (("lora", "mine"), ("prompt", "prompt"), ("deep", "deep-prompt"))
    }
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}
    common["inference_mode"] = True
    assert written["lora"] == common | {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(matrices().blocks[0].lora),
        **{"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "use_rslora": False},
    }
    assert written["prompt"] == common | {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 5,
        "token_dim": 48,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_transformer_submodules": 1,
    }
    assert written["deep"] == written["prompt"] | {"peft_type": "PETALNODE_PROMPT"}


NAMES: dict[str, tuple[str, str | None, list[str]]] = {
    "bloom": ("bloom", None, ["base_model.model.transformer.h.", "base_model.model.h."]),
    "opt": (
        "opt",
        None,
        ["base_model.model.model.decoder.layers.", "base_model.model.decoder.layers."],
    ),
    "llama": ("llama", None, ["base_model.model.layers.", "model.layers.", "layers."]),
    "gemma3": (
        "gemma3",
        "untied",
        [
            f"base_model.model.{root}layers."
            for root in ("language_model.model.", "model.language_model.", "model.")
        ],
    ),
}


@pytest.mark.parametrize("family", NAMES)
def test_names_of_modules(tmp_path: Path, family: str) -> None:
    """As they are in the classes without a head, and in older versions of transformers."""
    config = config_of(family, NAMES[family][1])
    made = some_tuning(config, tokens=0)
    tuning = Tuning({index: BlockTuning(block.lora) for index, block in made.blocks.items()})
    save_adapter(tmp_path, Adapter(tuning), config, "base")
    tensors = load_file(tmp_path / WEIGHTS)
    start = next(iter(tensors)).split("0.")[0]
    for other in NAMES[family][2]:
        for end in ("weight", "default.weight"):
            renamed = {
                other + name.removeprefix(start).removesuffix("weight") + end: tensor
                for name, tensor in tensors.items()
            }
            save_file(renamed, tmp_path / WEIGHTS)
            assert same(load_adapter(tmp_path, config).tuning, tuning)


def test_names_in_a_tower_for_images(tmp_path: Path) -> None:
    config = config_of("gemma3", "untied")
    made = some_tuning(config)
    tuning = Tuning({index: BlockTuning(block.lora) for index, block in made.blocks.items()})
    save_adapter(tmp_path, Adapter(tuning), config, "base")
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(iter(tensors))
    assert name.startswith("base_model.model.model.language_model.layers.0.")
    tower = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{tower}.lora_A.weight": tensors[name].clone()}, tmp_path / WEIGHTS)
    assert "vision_tower" in message(tmp_path, config)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    prompt = noise(5, 48, seed=9)
    both = Tuning({0: BlockTuning(matrices().blocks[0].lora, prompt)})
    nan = Adapter(matrices().map(lambda tensor: tensor * float("nan")))
    place = tmp_path / "mine"
    for adapter, words in (
        (Adapter(NOTHING), "nothing in the adapter"),
        (Adapter(Tuning({1: BlockTuning()})), "nothing in the adapter"),
        (Adapter(both), "not both"),
        (Adapter(matrices(), prompt), "not both"),
        (Adapter(prompts(5), noise(4, 48, seed=1)), r"differ in length: \[4, 5\]"),
        (nan, "not finite"),
        (Adapter(NOTHING, prompt[:, 1:]), r"\[5, 47\]"),
        (Adapter(Tuning({7: BlockTuning(prompt=prompt)})), "a block 7"),
    ):
        with pytest.raises(UsageError, match=words):
            save_adapter(place, adapter, LLAMA, "base")
        assert not place.exists()
    place.write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        save_adapter(place, KINDS["lora"], LLAMA, "base")
