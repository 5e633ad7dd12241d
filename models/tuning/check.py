"""Whether a tuning fits a model: asked of every one that comes from a file or from a peer."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from petalnode.errors import UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.finite import is_finite
from petalnode.models.tuning.sites import lora_sites, unknown_target
from petalnode.models.tuning.tuning import LowRank, Tuning

MAX_RANK = 1024
MAX_SCALE = 1e6
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHER_MODEL = "It was made for another model: use that model, or another adapter."


def check_tuning(config: ModelConfig, start: int, end: int, tuning: Tuning) -> None:
    """Raise `UsageError`, naming the first fault, for a tuning that blocks [start, end) cannot run.

    Checked are blocks, sites, shapes, ranks, scales, dtypes, and that all numbers are finite.
    """
    for index, block in tuning.blocks.items():
        if type(index) is not int or not start <= index < end:
            raise UsageError(
                f"The adapter has a block {index}, but these are the blocks {start}:{end}.",
                OTHER_MODEL,
            )
        sites = lora_sites(config, index)
        for site, pair in block.lora.items():
            if site not in sites:
                raise unknown_target(site, sorted(sites))
            _check_pair(f"{site} in block {index}", pair, *sites[site])
        if block.prompt is not None:
            check_prompt(config, block.prompt, f"The prompt of block {index}")


def check_prompt(config: ModelConfig, prompt: Tensor, what: str = "The prompt") -> None:
    """Raise `UsageError` for a prompt that is not [P, H] with 1 <= P < the context."""
    if prompt.ndim != 2 or prompt.shape[1] != config.hidden_size:
        raise UsageError(
            f"{what} has the shape {list(prompt.shape)}, "
            f"but the model's hidden states have {config.hidden_size} numbers.",
            OTHER_MODEL,
        )
    if not 0 < len(prompt) < config.max_positions:
        raise UsageError(
            f"{what} has {len(prompt)} tokens, but the model's context is {config.max_positions}.",
            "Use a shorter prompt.",
        )
    _check_numbers(what, prompt)


def check_rank(rank: int, what: str) -> None:
    """Raise `UsageError` for a rank that low-rank matrices cannot have here."""
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise UsageError(
            f"{what} has the rank {str(rank)[:40]}.", f"Use a whole number from 1 to {MAX_RANK}."
        )


def check_scale(scale: float, what: str) -> None:
    """Raise `UsageError` for a scale, alpha / rank, that is no ordinary number."""
    if not is_number(scale) or not abs(scale) <= MAX_SCALE:  # also nan, or too long for a float
        raise UsageError(
            f"{what} has the scale {str(scale)[:40]}.",
            f"Use one of at most {MAX_SCALE:g} (alpha / rank).",
        )


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of a stranger's is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_shapes(a: tuple[int, ...], b: tuple[int, ...], what: str, outs: int, ins: int) -> None:
    """Raise `UsageError` unless the shapes are [R, inputs] and [outputs, R], R a usable rank."""
    if len(a) == 2:
        check_rank(a[0], what)
    if len(a) != 2 or a[1] != ins or b != (outs, a[0]):
        raise UsageError(
            f"The adapter's matrices for {what} have the shapes {list(a)} and {list(b)}, "
            f"but the layer takes {ins} numbers and gives {outs}.",
            OTHER_MODEL,
        )


def _check_pair(what: str, pair: LowRank, outputs: int, inputs: int) -> None:
    check_shapes(tuple(pair.a.shape), tuple(pair.b.shape), what, outputs, inputs)
    check_scale(pair.scale, what)
    if pair.a.dtype != pair.b.dtype:
        raise UsageError(f"The adapter's two matrices for {what} differ in dtype.", "Save it anew.")
    for matrix in (pair.a, pair.b):
        _check_numbers(f"The adapter's matrix for {what}", matrix)


def _check_numbers(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        names = ", ".join(str(one).removeprefix("torch.") for one in FLOATS)
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(f"{what} has the dtype {dtype}.", f"Use one of {names}.")
    if not is_finite(tensor):
        raise UsageError(
            f"{what} holds numbers that are not finite.",
            "Go back to an adapter from before its training failed.",
        )
