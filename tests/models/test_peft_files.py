"""Adapters as files, without peft: what is written, read in parts, fetched, and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnode.errors import ModelError, PetalnodeError, UsageError
from petalnode.models.tuning import peft_files
from petalnode.models.tuning.peft_config import LoraSettings, read_lora
from petalnode.models.tuning.peft_files import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_block_bytes,
    adapter_digest,
    adapter_files,
    load_adapter,
    save_adapter,
)
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning

from .hub_server import HubServer
from .test_tuning import LLAMA, config_of
from .tuned_reference import noise, some_tuning

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a LoRA."""
    save_adapter(tmp_path / "mine", KINDS["lora"], LLAMA, "org/base")
    return tmp_path / "mine"


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


def test_saved_again(saved: Path) -> None:
    """Over the old one; the digest tells which it is."""
    digest = adapter_digest(saved)
    assert len(digest) == 8
    int(digest, 16)
    save_adapter(saved, KINDS["lora"], LLAMA, "org/base")
    assert adapter_digest(saved) == digest
    halves = Adapter(KINDS["lora"].tuning.map(lambda tensor: tensor / 2))
    save_adapter(saved, halves, LLAMA, "org/base")
    assert adapter_digest(saved) != digest
    assert same(load_adapter(saved, LLAMA).tuning, halves.tuning)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(saved: Path, dtype: torch.dtype) -> None:
    """Are read as float32, the dtype that everything is added in."""
    tensors = {name: one.to(dtype) for name, one in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    read = dict(load_adapter(saved, LLAMA).tuning.named())
    assert all(one.dtype == torch.float32 for one in read.values())
    for name, tensor in matrices().named():
        assert torch.equal(read[name], tensor.to(dtype).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_gets_at_most(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """In float32, as which it is loaded; known from the headers alone."""
    save_adapter(tmp_path, KINDS[kind], LLAMA, "org/base")
    tensors = {name: one.to(dtype) for name, one in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    loaded = [load_adapter(tmp_path, LLAMA, (index, index + 1)).tuning for index in range(3)]
    assert adapter_block_bytes(tmp_path, LLAMA) == max(one.nbytes for one in loaded)


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


def test_what_peft_wants_in_the_files(saved: Path) -> None:
    settings = json.loads((saved / CONFIG).read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"]) == (3, 4)
    assert settings["target_modules"] == sorted(matrices().blocks[0].lora)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert load_file(saved / WEIGHTS)[KEY.format(2, "A")].shape == (3, 48)


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
    tower = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{tower}.lora_A.weight": tensors[name].clone()}, tmp_path / WEIGHTS)
    assert "vision_tower" in message(tmp_path, config)


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


def message(place: Path, config: Any = LLAMA, kind: type[PetalnodeError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        load_adapter(place, config)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def damage(place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(place / WEIGHTS)
    change(tensors)
    save_file(tensors, place / WEIGHTS)


def configure(place: Path, **keys: Any) -> None:
    settings = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(settings | keys))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING'"),
    "no method": ({"peft_type": None}, "of the kind 'None'"),
    "a list of methods": ({"peft_type": ["LORA"]}, "of the kind"),
    "DoRA": ({"use_dora": True}, "DoRA (use_dora)"),
    "biases": ({"bias": "lora_only"}, "biases (bias = 'lora_only')"),
    "biases of LoRA": ({"lora_bias": True}, "biases (lora_bias)"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embeddings": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
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
    "an expression": ({"rank_pattern": {"(.*)*x": 3}}, "rank_pattern = '(.*)*x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(saved: Path, case: str) -> None:
    keys, words = REFUSED[case]
    configure(saved, **keys)
    told = message(saved)
    assert words in told
    assert "mine" in told


def test_harmless_settings(saved: Path) -> None:
    configure(
        saved,
        **{"init_lora_weights": "gaussian", "lora_dropout": 0.3, "fan_in_fan_out": True},
        **{"modules_to_save": [], "bias": None, "peft_version": "9", "loftq_config": {}},
        **{"target_modules": "anything", "task_type": "SEQ_CLS", "base_model_name_or_path": 7},
    )
    assert load_adapter(saved, LLAMA).base_model == ""


Change = Callable[[dict[str, torch.Tensor]], object]
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
    "another model's size": (
        lambda t: t.update({KEY.format(1, "A"): torch.zeros(3, 64)}),
        "[3, 64] and [48, 3], but the layer takes 48 numbers and gives 48",
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


def test_a_config_that_is_none(saved: Path) -> None:
    for text, words in (("{", "not valid JSON"), ("[]", "JSON object"), (" " * (1 << 21), "bytes")):
        (saved / CONFIG).write_text(text)
        assert words in message(saved, kind=ModelError)


def test_files_that_lack(saved: Path, tmp_path: Path) -> None:
    assert adapter_files(str(saved)) == saved
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    for call in (lambda: load_adapter(saved, LLAMA), lambda: adapter_files(str(saved))):
        with pytest.raises(UsageError, match=r"pickled weights \(adapter_model.bin\).*any code"):
            call()
    (saved / "adapter_model.bin").unlink()
    assert f"has no {WEIGHTS}" in message(saved)
    (saved / CONFIG).unlink()
    assert f"has no {CONFIG}" in message(saved)
    for place in (str(tmp_path / "none"), "none", "./org/name", "a/b/c"):
        with pytest.raises(UsageError, match="There is no adapter"):
            adapter_files(place)


PROMPTS: dict[str, tuple[str, dict[str, Any], Change, str]] = {
    "another model's width": ("prompt", {"token_dim": 64}, lambda t: None, "token_dim = 64"),
    "another model's depth": ("deep-prompt", {"num_layers": 4}, lambda t: None, "num_layers = 4"),
    "no number of tokens": (
        "prompt",
        {"num_virtual_tokens": None},
        lambda t: None,
        "num_virtual_tokens = None",
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


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_models_that_change_embeddings(tmp_path: Path, family: str) -> None:
    """A prompt of peft's is another thing there; ours is saved as ours."""
    config = config_of(family)
    made = Adapter(NOTHING, noise(5, config.hidden_size, seed=9))
    save_adapter(tmp_path, made, config, "base")
    assert load_adapter(tmp_path, config).kind == "prompt"
    configure(tmp_path, peft_type="PROMPT_TUNING")
    assert f"which a {family} changes before" in message(tmp_path, config)


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


def test_a_repo_of_the_hub(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    """Two files are fetched, whatever else is there; the second time none."""
    shutil.copy(saved / WEIGHTS, saved / "training_args.bin")
    hub.add("org/adapter", saved)
    place = adapter_files("org/adapter", tmp_path / "hub")
    assert sorted(path.name for path in place.iterdir()) == [CONFIG, WEIGHTS]
    assert same(load_adapter(place, LLAMA).tuning, matrices())
    assert adapter_digest(place) == adapter_digest(saved)
    sent = len(hub.bodies(".safetensors"))
    assert adapter_files("org/adapter", tmp_path / "hub") == place
    assert len(hub.bodies(".safetensors")) == sent == 1


def test_a_repo_of_the_hub_without_safetensors(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    hub.add("org/pickled", saved)
    with pytest.raises(UsageError, match=r"repo org/pickled has only pickled weights"):
        adapter_files("org/pickled", tmp_path / "hub")
    (saved / CONFIG).unlink()
    hub.add("org/model", saved)
    with pytest.raises(ModelError, match=rf"repo org/model lacks the file {CONFIG}"):
        adapter_files("org/model", tmp_path / "hub")
