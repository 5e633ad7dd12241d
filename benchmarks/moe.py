"""One process, one thread: petalnode's mixture of experts against transformers', float32.

Prints ms of CPU time for the feed-forward of one block of Qwen3-30B-A3B's sizes (8 of 128 experts,
random weights, 2.4 GB), for a token and for more of them, medians of interleaved runs. transformers
computes it as it comes, by grouped products, and by its plain loop.

    python -m benchmarks.moe [--quick]
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.blocks import interleaved_ms
from petalnode.models.layers.experts import GroupedLinear
from petalnode.models.layers.moe import MixtureOfExperts, SoftmaxRouter, gated
from petalnode.models.layers.weights import Linear, TorchParts

CHOSEN = 8
SIZES = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
TURNS = {1: 80, 4: 40, 16: 16, 64: 8, 256: 8}
"""By number of tokens."""


def make_theirs() -> Any:
    """Return transformers' feed-forward."""
    config = Qwen3MoeConfig(**SIZES, num_experts_per_tok=CHOSEN, norm_topk_prob=True)
    module = Qwen3MoeSparseMoeBlock(config).eval()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return module


def make_ours(theirs: Any) -> MixtureOfExperts:
    """Return petalnode's feed-forward over the same weights."""
    router = SoftmaxRouter(Linear(theirs.gate.weight, None), CHOSEN, renormalise=True, rounded=True)
    gate_up, down = (
        GroupedLinear([Linear(weight, None) for weight in stacked])
        for stacked in (theirs.experts.gate_up_proj, theirs.experts.down_proj)
    )
    parts = TorchParts(torch.float32, torch.device("cpu"))
    return MixtureOfExperts(router, gate_up, gated(parts, "silu"), down)


def run_theirs(module: Any, how: str, x_TH: Tensor) -> Tensor:
    """Return transformers' output by one of its implementations."""
    module.experts.config._experts_implementation = how
    out: Tensor = module(x_TH[None])[0]
    return out


@torch.inference_mode()
def main() -> None:
    """Parse the flags and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = make_theirs()
    ours = make_ours(theirs)
    for tokens, turns in TURNS.items():
        x_TH = torch.randn(tokens, SIZES["hidden_size"])
        worst = float((ours(x_TH) - run_theirs(theirs, "eager", x_TH)).abs().max())
        steps = [partial(run_theirs, theirs, how, x_TH) for how in ("grouped_mm", "eager")]
        own, grouped, loop = interleaved_ms(
            [partial(ours, x_TH), *steps], turns // 4 if args.quick else turns
        )
        print(
            f"{tokens:4} tokens: petalnode {own:8.2f} ms   transformers {grouped:8.2f} ms "
            f"({own / grouped:.2f} x)   its loop {loop:8.2f} ms ({own / loop:.2f} x)   "
            f"largest difference {worst:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
