"""The package peft itself, both ways: adapters saved here, and adapters it saves; logits 1e-4."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.span import RowSlice
from petalnode.models.tuning.peft_config import CHANGES_MORE
from petalnode.models.tuning.peft_files import Adapter, load_adapter, save_adapter
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning

from ..checkpoints import MakeCheckpoint
from .parity import TOLERANCE, difference, prompt
from .reference import load_reference
from .shapes import SHAPES
from .tuned_reference import noise, some_tuning

FIRST = {family: next(iter(shapes)) for family, shapes in SHAPES.items()}
TEXT_TOWER = r".*language_model.*\.self_attn\.[qkvo]_proj"
IDS = prompt(27, 301)


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    return peft


READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "peft_type"}
READ |= {"init_lora_weights", "base_model_name_or_path"}
NO_MATTER = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}
NO_MATTER |= {"lora_dropout", "fan_in_fan_out", "runtime_config", "ensure_weight_tying"}
NO_MATTER |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
NO_MATTER |= {"megatron_core", "qalora_group_size"}  # nothing without what is refused
NO_MATTER |= {f"{start}_config" for start in ("loftq", "eva", "corda", "lora_ga")}  # nor these


def test_every_setting_of_peft_is_known(peft: Any) -> None:
    """One that a new version adds may change the result: it shall not be passed over."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - READ - NO_MATTER <= set(CHANGES_MORE)


@pytest.fixture(scope="module", params=FIRST)
def model(request: pytest.FixtureRequest, tiny_checkpoint: MakeCheckpoint) -> Path:
    return tiny_checkpoint(family=request.param, **SHAPES[request.param][FIRST[request.param]])


def config_of(path: Path) -> Any:
    return open_checkpoint(str(path)).config


def lora(path: Path) -> Tuning:
    blocks = some_tuning(config_of(path)).blocks
    return Tuning({index: BlockTuning(block.lora) for index, block in blocks.items()})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return transformers' logits, of peft's model around it or its own."""
    ids = torch.tensor([IDS])
    out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    return out


def with_peft(peft: Any, path: Path, adapter: Path) -> Tensor:
    """Return the logits of peft's model of an adapter's directory; everything must be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return logits(peft.PeftModel.from_pretrained(load_reference(path), str(adapter)).eval())


def ours(path: Path, adapter: Path) -> Tensor:
    """Return petalnode's logits with an adapter's directory."""
    checkpoint = open_checkpoint(str(path))
    config = checkpoint.config
    loaded = load_adapter(adapter, config)
    span, client = load_block_span(checkpoint, 0, config.num_blocks), load_client(checkpoint)
    x = client.embed(torch.tensor(IDS), torch.arange(len(IDS)))
    if loaded.prompt is not None:
        x = torch.cat((loaded.prompt, x))
    row = RowSlice(span.new_row(0, config.num_blocks), 0, len(x), loaded.tuning)
    y = span.forward(x, [row], 0, config.num_blocks)
    return client.logits(y)


def test_ours_in_peft(peft: Any, model: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path, Adapter(lora(model)), config_of(model), str(model))
    theirs = with_peft(peft, model, tmp_path)
    assert difference(ours(model, tmp_path), theirs) < TOLERANCE
    assert difference(logits(load_reference(model)), theirs) > 0.1


def test_ours_of_some_modules_in_peft(peft: Any, model: Path, tmp_path: Path) -> None:
    """Blocks that differ in their modules, modules in their ranks and scales."""
    whole = lora(model).blocks
    size = len(whole)
    last = sorted(whole[size - 1].lora)
    site = next(one for one in last if "attn" in one or "attention" in one)
    odd = whole[size - 1].lora[site]
    some = {site: LowRank(odd.a[:2], odd.b[:, :2], 1.25)}
    tuning = Tuning({0: whole[0], size - 1: BlockTuning(some)})
    save_adapter(tmp_path, Adapter(tuning), config_of(model), str(model))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(settings["rank_pattern"].values()) == [2]
    assert list(settings["alpha_pattern"].values()) == [2.5]
    theirs = with_peft(peft, model, tmp_path)
    assert difference(ours(model, tmp_path), theirs) < TOLERANCE


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_theirs_in_ours(peft: Any, model: Path, tmp_path: Path, rslora: bool) -> None:
    """Ranks and alphas of single modules too, as peft itself trains and saves them."""
    sites = sorted(site for site in lora(model).blocks[0].lora if "attn" in site or "atte" in site)
    towers = config_of(model).family == "gemma3"
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=TEXT_TOWER if towers else sites,
        use_rslora=rslora,
        rank_pattern={sites[0]: 2},
        alpha_pattern={sites[-1].replace(".", r"\."): 5},
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(load_reference(model), settings).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.1, generator=generator)
    wrapped.save_pretrained(tmp_path)
    theirs = logits(wrapped)
    assert difference(ours(model, tmp_path), theirs) < TOLERANCE
    assert difference(logits(load_reference(model)), theirs) > 0.1


def test_prompts_both_ways(peft: Any, model: Path, tmp_path: Path) -> None:
    """Where peft's prompt, beside the embeddings, is what the first block sees."""
    config = config_of(model)
    plain = config.family not in ("bloom", "opt")
    made = Adapter(NOTHING, noise(5, config.hidden_size, seed=3, scale=0.5))
    save_adapter(tmp_path / "ours", made, config, str(model))
    kind = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"]
    assert kind == ("PROMPT_TUNING" if plain else "PETALNODE_PROMPT")
    if plain:
        theirs = with_peft(peft, model, tmp_path / "ours")
        assert difference(ours(model, tmp_path / "ours"), theirs) < TOLERANCE
        settings = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            wrapped = peft.get_peft_model(load_reference(model), settings).eval()
        wrapped.save_pretrained(tmp_path / "theirs")
        assert difference(ours(model, tmp_path / "theirs"), logits(wrapped)) < TOLERANCE
