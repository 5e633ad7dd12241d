"""Mixtures of experts: who is computed, what MXFP4 files become, and what all of it takes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from petalnode.errors import ModelError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.layers import experts
from petalnode.models.layers.experts import GroupedLinear, Mxfp4Fill, expand_mxfp4
from petalnode.models.layers.moe import (
    MixtureOfExperts,
    SoftmaxRouter,
    TopRouter,
    clamped_swiglu,
)
from petalnode.models.layers.weights import TorchParts
from petalnode.models.loading import load_block_span
from petalnode.models.memory import QUANTS, block_bytes

from ..checkpoints import MakeCheckpoint
from . import parity
from .reference import Local, load_reference, reference_logits
from .shapes.moe import BASE, GPT_OSS, MOE, QWEN

SMALL_GPT_OSS = GPT_OSS | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
EXPERTS = "model.layers.{}.mlp.experts."


def rows(*values: Sequence[float]) -> Tensor:
    return torch.tensor(values)


def test_weights_among_all_experts() -> None:
    logits = rows([0.0, 3.0, 1.0, 2.0]).log_softmax(-1)
    weights, chosen = SoftmaxRouter(lambda x: x, 2, renormalise=False, rounded=True)(logits)
    assert chosen.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, logits.exp()[:, [1, 3]])
    renormalised, _ = SoftmaxRouter(lambda x: x, 2, renormalise=True, rounded=True)(logits)
    torch.testing.assert_close(renormalised, weights / weights.sum())


def test_weights_among_the_chosen() -> None:
    weights, chosen = TopRouter(lambda x: x, 2)(rows([0.0, 3.0, 1.0, 2.0]))
    assert chosen.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, rows([3.0, 2.0]).softmax(-1))


@pytest.mark.parametrize(("rounded", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_router_in_bfloat16(rounded: bool, dtype: torch.dtype) -> None:
    logits = rows([0.5, 0.25]).to(torch.bfloat16)
    weights, _ = SoftmaxRouter(lambda x: x, 1, renormalise=False, rounded=rounded)(logits)
    assert weights.dtype == dtype
    assert float(weights) == pytest.approx(float(rows([0.5, 0.25]).softmax(-1)[0, 0]), rel=4e-3)


class Recorder:
    """Stands in for E experts: doubles or keeps its input, and writes down what was asked."""

    def __init__(self, grow: int) -> None:
        self.asked: list[list[tuple[int, int]]] = []
        self._grow = grow

    def __call__(self, x_SI: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        self.asked.append(list(groups))
        expert_S1 = torch.cat([torch.full((n, 1), float(expert)) for expert, n in groups])
        return torch.cat((x_SI, expert_S1.expand_as(x_SI)), -1) if self._grow else x_SI


def test_only_experts_that_are_hit_are_computed() -> None:
    chosen = torch.tensor([[900, 3], [3, 17], [3, 900]])
    weights = rows([0.5, 0.5], [0.25, 0.75], [1.0, 0.0])
    up, down = Recorder(1), Recorder(0)
    mixture = MixtureOfExperts(lambda x: (weights, chosen), up, lambda gate, up: gate * up, down)
    x = rows([1.0, 1.0], [2.0, 2.0], [10.0, 10.0])
    out = mixture(x)
    assert up.asked == down.asked == [[(3, 3), (17, 1), (900, 2)]]
    factors = [0.5 * 900 + 0.5 * 3, 0.25 * 3 + 0.75 * 17, 3.0]
    torch.testing.assert_close(out, x * torch.tensor(factors)[:, None])


def test_each_expert_gets_its_rows() -> None:
    layers = [lambda x, e=e: x + 10 * e for e in range(4)]
    x = torch.arange(5.0).view(5, 1)
    out = GroupedLinear(layers)(x, [(1, 2), (3, 3)])
    assert out.flatten().tolist() == [10.0, 11.0, 32.0, 33.0, 34.0]


def test_the_clamps_of_gpt_oss() -> None:
    gate, up = rows([9.0, -9.0, 1.0]), rows([9.0, -9.0, 0.5])
    out = clamped_swiglu(7.0)(gate, up)
    silu = [7 / (1 + 2.718281828 ** (-1.702 * 7)), -9 / (1 + 2.718281828 ** (1.702 * 9))]
    expected = [8 * silu[0], -6 * silu[1], 1.5 / (1 + 2.718281828**-1.702)]
    torch.testing.assert_close(out, rows(expected))


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", BASE | {"num_local_experts": 3, "intermediate_size": 33}),
    "qwen3_moe": ("qwen3_moe", QWEN | {"moe_intermediate_size": 21, "head_dim": 6}),
    "gpt_oss": ("gpt_oss", GPT_OSS | {"hidden_size": 65, "intermediate_size": 27, "head_dim": 10}),
}


@pytest.mark.parametrize(("family", "config"), ODD.values(), ids=list(ODD))
def test_odd_sizes(family: str, config: dict[str, Any], tiny_checkpoint: MakeCheckpoint) -> None:
    """Sizes that transformers' grouped products refuse: its plain loop is the reference."""
    path = tiny_checkpoint(family=family, **config)
    model = load_reference(path)
    model.set_experts_implementation("eager")
    for check in (parity.whole_prompt, parity.split_at_every_block, parity.unequal_rows):
        assert check(path, model) < parity.TOLERANCE


def random_mxfp4(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return blocks and scales of four experts, weights about as large as others here."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_expanded_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).repeat(16, 1).view(4, 16, 4, 16)
    scales = torch.arange(255, dtype=torch.uint8).repeat(2)[:256].view(4, 16, 4)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).mT
    ours = torch.stack([expand_mxfp4(*pair) for pair in zip(blocks, scales, strict=True)])
    assert torch.equal(ours.to(dtype), theirs)
    random = random_mxfp4(24, 64, 0)
    theirs = convert_moe_packed_tensors(*random, dtype=dtype).mT
    assert torch.equal(torch.stack(list(map(expand_mxfp4, *random))).to(dtype), theirs)


class Kept:
    """An expert that remembers its rows."""

    rows: Tensor

    def fill(self, begin: int, rows: Tensor) -> None:
        assert begin == 0
        self.rows = rows


@pytest.mark.parametrize("first", ["blocks", "scales"])
def test_blocks_and_scales_come_in_any_order(first: str) -> None:
    blocks, scales = random_mxfp4(6, 32, 1)
    kept, order = [Kept() for _ in range(4)], [0, 2, 4, 1, 3, 5]
    fill = Mxfp4Fill(kept, torch.tensor(order))
    steps: list[Callable[[], None]] = [lambda: fill.blocks(blocks), lambda: fill.scales(scales)]
    for step in steps if first == "blocks" else reversed(steps):
        assert not any(hasattr(one, "rows") for one in kept)
        step()
    for at, expert in enumerate(kept):
        assert torch.equal(expert.rows, expand_mxfp4(blocks[at], scales[at])[order])
        assert expert.rows.is_contiguous()
    assert vars(fill).get("_blocks") is vars(fill).get("_scales") is None


def test_experts_are_expanded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that loading takes the memory of one expert's numbers, not of a block's."""
    alive: list[Tensor] = []
    seen: list[int] = []

    class Next:
        def fill(self, begin: int, rows: Tensor) -> None:
            seen.append(len(alive))

    def expand(blocks: Tensor, scales: Tensor) -> Tensor:
        alive.append(expand_mxfp4(blocks, scales))
        return alive[-1]

    monkeypatch.setattr(experts, "expand_mxfp4", expand)
    fill = Mxfp4Fill([Next()] * 4, None)
    blocks, scales = random_mxfp4(6, 32, 2)
    fill.scales(scales)
    fill.blocks(blocks)
    assert seen == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def mxfp4(tiny_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss whose experts are MXFP4, in shards: each has its blocks in another than scales."""
    source = tiny_checkpoint(family="gpt_oss", **SMALL_GPT_OSS)
    path = tmp_path_factory.mktemp("mxfp4")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))
    first, second = load_file(source / "model.safetensors"), dict[str, Tensor]()
    for block in range(2):
        for name, sizes in (("gate_up_proj", (64, 64)), ("down_proj", (64, 32))):
            stem = EXPERTS.format(block) + name
            del first[stem]
            blocks, scales = random_mxfp4(*sizes, seed=block)
            shards = (first, second) if block else (second, first)
            shards[0][f"{stem}_blocks"], shards[1][f"{stem}_scales"] = blocks, scales
    save_file(first, path / "a.safetensors", {"format": "pt"})
    save_file(second, path / "b.safetensors", {"format": "pt"})
    where = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_an_mxfp4_checkpoint_equals_transformers(mxfp4: Path) -> None:
    """transformers expands it too, without the kernels that a GPU would have."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        mxfp4, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    model = model.float().eval()
    ids = parity.prompt(60, model.config.vocab_size)
    local = Local(mxfp4, cuts=(1,))
    ours = local.step([local.row()], [ids])
    assert parity.difference(ours, reference_logits(model, ids)) < parity.TOLERANCE


def test_mxfp4_tensors_of_another_dtype(mxfp4: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((mxfp4 / "config.json").read_text())
    tensors = load_file(mxfp4 / "a.safetensors") | load_file(mxfp4 / "b.safetensors")
    name = EXPERTS.format(1) + "down_proj_blocks"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}.*I8.*Use a checkpoint in one of U8"):
        open_checkpoint(str(tmp_path))


SIZED = {
    "mixtral": BASE | {"hidden_size": 64, "intermediate_size": 128, "num_local_experts": 3},
    "qwen3_moe": QWEN | {"hidden_size": 64, "decoder_sparse_step": 2, "num_hidden_layers": 2},
    "gpt_oss": SMALL_GPT_OSS,
}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", [*SIZED, "mxfp4"])
def test_memory_is_what_was_predicted(
    family: str, quant: str, tiny_checkpoint: MakeCheckpoint, mxfp4: Path
) -> None:
    sized = SIZED.get(family)
    path = mxfp4 if sized is None else tiny_checkpoint(family=family, **sized)
    checkpoint = open_checkpoint(str(path))
    last = checkpoint.config.num_blocks - 1
    span = load_block_span(checkpoint, last, last + 1, dtype="bfloat16", quant=quant)
    assert span.param_bytes == block_bytes(checkpoint.config, last, 2, quant)


@pytest.mark.parametrize("quant", QUANTS)
def test_each_expert_is_the_layer_that_it_would_be_alone(quant: str) -> None:
    """Apart or stacked in the files, quantized or not."""
    weights = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    x, groups = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), [(0, 1), (2, 5)]
    parts = TorchParts(torch.float32, torch.device("cpu"), quant)
    alone = [parts.linear(f"alone.{one}", 8, 64) for one in range(3)]
    apart = parts.experts(("gate.{}", "up.{}"), 3, (4, 4), 64)
    stacked = parts.stacked_experts("stacked", 3, 8, 64, row_order=[*range(7, -1, -1)])
    for one, weight in enumerate(weights):
        parts.targets[f"alone.{one}.weight"](weight)
        parts.targets[f"gate.{one}.weight"](weight[:4])
        parts.targets[f"up.{one}.weight"](weight[4:])
    parts.targets["stacked"](weights.flip(1).mT.contiguous())
    parts.targets["stacked_bias"](torch.zeros(3, 8))
    expected = torch.cat((alone[0](x[:1]), alone[2](x[1:])))
    assert torch.equal(apart(x, groups), expected)
    assert torch.equal(stacked(x, groups), expected)
    exact = torch.cat((x[:1] @ weights[0].mT, x[1:] @ weights[2].mT))
    error = float((expected - exact).norm() / exact.norm())
    assert (error < 1e-6) if quant == "none" else (1e-3 < error < 0.15)


def test_every_family_with_experts_is_here() -> None:
    assert set(SIZED) == set(ODD) == set(MOE)
