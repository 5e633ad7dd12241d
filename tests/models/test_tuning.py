"""Sites, targets, new matrices, and the check of every tuning that comes from elsewhere."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.families import read_config
from petalnode.models.layout import block_layout
from petalnode.models.tuning.check import (
    MAX_RANK,
    MAX_SCALE,
    check_prompt,
    check_rank,
    check_scale,
    check_tuning,
)
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.sites import lora_sites, match_targets
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning

from .shapes import SHAPES
from .tuned_reference import noise, some_tuning

LLAMA_SITES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def config_of(family: str, shape: str | None = None) -> ModelConfig:
    shapes = SHAPES[family]
    made = {k: v for k, v in shapes[shape or next(iter(shapes))].items() if k != "seed"}
    return read_config({"model_type": family} | made)


LLAMA = config_of("llama")
"""3 blocks of 48 numbers, 4 heads of 12, 2 key heads, 72 inside."""


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.cause.endswith(".")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500, "whatever was given"
    return str(caught.value)


def test_sites_of_a_llama() -> None:
    assert lora_sites(LLAMA, 1) == {
        "self_attn.q_proj": (48, 48),
        "self_attn.k_proj": (24, 48),
        "self_attn.v_proj": (24, 48),
        "self_attn.o_proj": (48, 48),
        "mlp.gate_proj": (72, 48),
        "mlp.up_proj": (72, 48),
        "mlp.down_proj": (48, 72),
    }
    lora_sites(LLAMA, 1).clear()
    assert lora_sites(LLAMA, 1), "each caller has its own"


@pytest.mark.parametrize("family", SHAPES)
def test_sites_are_matrices_of_the_checkpoint(family: str) -> None:
    """Of every block, by name and shape; no router, no expert."""
    config = config_of(family)
    for index in range(config.num_blocks):
        layout, sites = block_layout(config, index), lora_sites(config, index)
        assert sites
        assert all(layout[f"{site}.weight"].shape == shape for site, shape in sites.items())
        assert not any("expert" in site or site.endswith(("gate", "router")) for site in sites)
        dense = {name for name, spec in layout.items() if spec.in_linear and "expert" not in name}
        assert {f"{site}.weight" for site in sites} == dense


def test_targets() -> None:
    """By their last words, as peft has it."""
    assert match_targets(LLAMA, ["q_proj", "mlp.up_proj"]) == {
        index: ["self_attn.q_proj", "mlp.up_proj"] for index in range(3)
    }
    assert match_targets(LLAMA, ["all-linear"])[2] == list(lora_sites(LLAMA, 2))
    assert match_targets(LLAMA, "q_proj") == match_targets(LLAMA, ["q_proj"])
    mixed = config_of("qwen3_moe", "every other block, one dense, tied")
    assert set(match_targets(mixed, ["up_proj"])) == {0, 1, 2}, "block 3 has experts only"


def test_targets_that_are_none() -> None:
    for target in ("qproj", "proj", "_proj", "attn.q_proj", "", "experts.0.w1", "lm_head"):
        told = message(lambda target=target: match_targets(LLAMA, ["q_proj", target]))
        assert repr(target) in told
        assert "self_attn.q_proj" in told
    assert "'7'" in message(lambda: match_targets(LLAMA, [7]))  # type: ignore[list-item]
    assert "No target modules" in message(lambda: match_targets(LLAMA, []))
    there = "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj, self_attn.o_proj, "
    assert f"Name some of {there}self_attn.q_proj, self_attn.v_proj." in told
    told = message(lambda: match_targets(config_of("mixtral"), ["gate"]))
    assert "'gate'" in told, "routers stay as they are"


def test_new_matrices_change_nothing_yet() -> None:
    rng = torch.Generator().manual_seed(3)
    tuning = new_lora(LLAMA, rank=4, alpha=6, targets=["q_proj", "down_proj"], rng=rng)
    assert sorted(tuning.blocks) == [0, 1, 2]
    for block in tuning.blocks.values():
        assert list(block.lora) == ["self_attn.q_proj", "mlp.down_proj"]
        for site, inputs in (("self_attn.q_proj", 48), ("mlp.down_proj", 72)):
            pair = block.lora[site]
            assert (pair.a.shape, pair.b.shape, pair.scale) == ((4, inputs), (48, 4), 1.5)
            assert not bool(pair.b.any())
            bound = 1 / math.sqrt(inputs)
            assert bound * 0.9 < float(pair.a.abs().max()) <= bound
            assert abs(float(pair.a.std()) - bound / math.sqrt(3)) < 0.05 * bound
    check_tuning(LLAMA, 0, 3, tuning)


def test_new_matrices_depend_on_the_seed_alone() -> None:
    def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        made = new_lora(LLAMA, rank=2, alpha=2, targets=["v_proj"], rng=rng, dtype=dtype)
        return [tensor for _, tensor in made.named()]

    assert all(map(torch.equal, draw(1), draw(1)))
    assert not torch.equal(draw(1)[0], draw(2)[0])
    assert {tensor.dtype for tensor in draw(1, torch.bfloat16)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("rank", "alpha", "words"),
    [
        (0, 1, "rank 0"),
        (-2, 1, "rank -2"),
        (MAX_RANK + 1, 1, f"rank {MAX_RANK + 1}"),
        (4, math.inf, "scale inf"),
        (4, math.nan, "scale nan"),
        (1, 1e9, "scale 1000000000"),
        (2.5, 1, "rank 2.5"),
        (2.0, 1, "rank 2.0"),
        (True, 1, "rank True"),
        ("4", 1, "rank 4"),
        (None, 1, "rank None"),
        (math.nan, 1, "rank nan"),
        (10**400, 1, "rank 1000"),
        (4, 10**400, "scale 1000"),
        (4, "8", "scale 8"),
        (4, "8" * 10**6, "scale 8"),
        ("4" * 10**6, 1, "rank 4"),
        (4, None, "scale None"),
        (4, True, "scale True"),
    ],
)
def test_bad_ranks(rank: Any, alpha: Any, words: str) -> None:
    rng = torch.Generator()
    told = message(lambda: new_lora(LLAMA, rank=rank, alpha=alpha, targets=["q_proj"], rng=rng))
    assert told.startswith(f"The adapter has the {words}")


def pair(a: Any = (2, 48), b: Any = (48, 2), scale: float = 1.0, dtype: Any = None) -> LowRank:
    return LowRank(noise(*a, seed=1).to(dtype), noise(*b, seed=2).to(dtype), scale)


def with_number(number: float) -> LowRank:
    bad = pair()
    bad.b[3, 1] = number
    return bad


Q = "self_attn.q_proj"
BAD: dict[str, tuple[Tuning, str]] = {
    "a block below": (Tuning({0: BlockTuning()}), "a block 0, but these are the blocks 1:3"),
    "a block above": (Tuning({3: BlockTuning()}), "a block 3"),
    "a name for a block": (Tuning({"1": BlockTuning()}), "a block 1"),  # type: ignore[dict-item]
    "no site": (Tuning({1: BlockTuning({"self_attn.x": pair()})}), "'self_attn.x'"),
    "a suffix of a site": (Tuning({1: BlockTuning({"q_proj": pair()})}), "'q_proj'"),
    "another model's inputs": (
        Tuning({2: BlockTuning({Q: pair(a=(2, 64))})}),
        "q_proj in block 2 have the shapes [2, 64] and [48, 2], but the layer takes 48",
    ),
    "another model's outputs": (Tuning({2: BlockTuning({Q: pair(b=(64, 2))})}), "[64, 2]"),
    "ranks that differ": (Tuning({2: BlockTuning({Q: pair(b=(48, 3))})}), "[48, 3]"),
    "turned around": (Tuning({2: BlockTuning({Q: pair(a=(48, 2), b=(2, 48))})}), "[48, 2]"),
    "no dimension": (Tuning({2: BlockTuning({Q: pair(a=(), b=())})}), "[] and []"),
    "one dimension": (Tuning({2: BlockTuning({Q: pair(a=(48,))})}), "[48]"),
    "rank 0": (Tuning({2: BlockTuning({Q: pair(a=(0, 48), b=(48, 0))})}), "rank 0"),
    "an absurd rank": (
        Tuning({2: BlockTuning({Q: pair(a=(MAX_RANK + 1, 48), b=(48, MAX_RANK + 1))})}),
        f"rank {MAX_RANK + 1}",
    ),
    "NaN": (Tuning({1: BlockTuning({Q: with_number(math.nan)})}), "not finite"),
    "infinity": (Tuning({1: BlockTuning({Q: with_number(-math.inf)})}), "not finite"),
    "an infinite scale": (Tuning({1: BlockTuning({Q: pair(scale=math.inf)})}), "scale inf"),
    "a scale that is a word": (
        Tuning({1: BlockTuning({Q: LowRank(pair().a, pair().b, "1")})}),  # type: ignore[arg-type]
        "scale 1.",
    ),
    "a scale that is none": (Tuning({1: BlockTuning({Q: pair(scale=math.nan)})}), "scale nan"),
    "an absurd scale below zero": (Tuning({1: BlockTuning({Q: pair(scale=-1e9)})}), "scale -1000"),
    "float64": (
        Tuning({1: BlockTuning({Q: pair(dtype=torch.float64)})}),
        "block 1 has the dtype float64. Use one of float32, bfloat16, float16.",
    ),
    "integers": (Tuning({1: BlockTuning({Q: pair(dtype=torch.int32)})}), "dtype int32"),
    "two dtypes": (
        Tuning({1: BlockTuning({Q: LowRank(pair().a, pair().b.bfloat16(), 1.0)})}),
        "differ in dtype",
    ),
    "a narrow prompt": (
        Tuning({1: BlockTuning(prompt=noise(3, 47, seed=1))}),
        "shape [3, 47], but",
    ),
    "a flat prompt": (Tuning({1: BlockTuning(prompt=noise(48, seed=1))}), "[48]"),
    "an empty prompt": (Tuning({1: BlockTuning(prompt=noise(0, 48, seed=1))}), "0 tokens"),
    "a prompt as long as the context": (
        Tuning({1: BlockTuning(prompt=noise(512, 48, seed=1))}),
        "512 tokens, but the model's context is 512",
    ),
    "a prompt with NaN": (
        Tuning({1: BlockTuning(prompt=torch.full((3, 48), math.nan))}),
        "prompt of block 1 holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tunings(case: str) -> None:
    tuning, words = BAD[case]
    assert words in message(lambda: check_tuning(LLAMA, 1, 3, tuning))


def test_good_tunings() -> None:
    whole = some_tuning(LLAMA)
    check_tuning(LLAMA, 0, 3, whole)
    check_tuning(LLAMA, 1, 2, whole.within(1, 2))
    check_tuning(LLAMA, 1, 2, NOTHING)
    for dtype in (torch.float16, torch.bfloat16):
        check_tuning(LLAMA, 0, 3, whole.to(dtype, torch.device("cpu")))
    check_tuning(LLAMA, 0, 3, Tuning({2: BlockTuning(prompt=noise(511, 48, seed=1))}))
    check_prompt(LLAMA, noise(1, 48, seed=1))
    assert message(lambda: check_prompt(LLAMA, noise(1, 47, seed=1))).startswith("The prompt has")


def test_limits_can_be_reached() -> None:
    check_rank(1, "x")
    check_rank(MAX_RANK, "x")
    for scale in (MAX_SCALE, -MAX_SCALE, 0):
        check_scale(scale, "x")


def test_other_dtypes() -> None:
    halves = some_tuning(LLAMA).to(torch.bfloat16, torch.device("cpu"))
    assert {tensor.dtype for _, tensor in halves.named()} == {torch.bfloat16}
    for _, leaf in halves.leaves(torch.device("cpu")).named():
        assert (leaf.dtype, leaf.requires_grad, leaf.is_leaf) == (torch.float32, True, True)


def test_sizes_and_names() -> None:
    tuning = some_tuning(LLAMA).within(1, 3)
    names = [name for name, _ in tuning.named()]
    assert names[0] == "1.mlp.down_proj.a"
    assert names[-1] == "2.prompt"
    turned = Tuning(dict(reversed(tuning.blocks.items())))
    assert [name for name, _ in turned.named()] == names
    assert tuning.nbytes == sum(tensor.nbytes for _, tensor in tuning.named())
    leaves = tuning.leaves(torch.device("cpu"))
    assert [name for name, _ in leaves.named()] == names
    for (_, leaf), (_, tensor) in zip(leaves.named(), tuning.named(), strict=True):
        assert leaf.requires_grad
        assert leaf.is_leaf
        assert leaf.data_ptr() == tensor.data_ptr()
        assert not tensor.requires_grad
