"""New low-rank matrices, which change nothing before they are trained (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from petalnode.models.config import ModelConfig
from petalnode.models.tuning.check import check_rank, check_scale
from petalnode.models.tuning.sites import lora_sites, match_targets
from petalnode.models.tuning.tuning import BlockTuning, LowRank, Tuning


def new_lora(
    config: ModelConfig,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tuning:
    """Return matrices of `rank` for all sites that `targets` name, in every block that has them.

    `a` is drawn from `rng` as PEFT draws it (Kaiming-uniform: within 1 / sqrt(inputs)), `b` is
    zero, the scale alpha / rank. Raises `UsageError` as `match_targets`, and for a bad rank, alpha.
    """
    check_rank(rank, "The adapter")
    check_scale(alpha, "The adapter")  # alpha / rank is smaller still
    blocks: dict[int, BlockTuning] = {}
    for index, names in match_targets(config, targets).items():
        sites = lora_sites(config, index)
        lora: dict[str, LowRank] = {}
        for name in names:
            outputs, inputs = sites[name]
            bound = 1 / math.sqrt(inputs)
            a = torch.empty((rank, inputs)).uniform_(-bound, bound, generator=rng)
            lora[name] = LowRank(
                a.to(dtype), torch.zeros((outputs, rank), dtype=dtype), alpha / rank
            )
        blocks[index] = BlockTuning(lora)
    return Tuning(blocks)
