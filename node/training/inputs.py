"""What a caller trains with, checked before any of it is sent or computed. No I/O.

Everything here raises ``UsageError`` with what is wrong and what to give instead. T tokens, H
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from petalnode.errors import UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.finite import is_finite
from petalnode.models.tuning.check import FLOATS, OTHER_MODEL
from petalnode.models.tuning.tuning import Tuning


def check_tensor(what: str, given: object) -> None:
    """Refuse lists and arrays, and tensors that do not hold all their numbers."""
    if not isinstance(given, Tensor):
        raise UsageError(
            f"{what} is a {type(given).__name__}, not a tensor.",
            'Make tensors of it: a tokenizer does with return_tensors="pt".',
        )
    unusual = {
        "on the meta device": given.is_meta,
        "nested": given.is_nested,
        str(given.layout): given.layout != torch.strided,
    }
    for kind, is_so in unusual.items():
        if is_so:
            why = f"{what} is no dense tensor of numbers, but {kind}."
            raise UsageError(why, "Give a dense tensor that holds numbers.")


def check_floats(what: str, given: Tensor) -> None:
    """Refuse what is not finite, or no floating point numbers that hops compute with."""
    if given.dtype not in (*FLOATS, torch.float64):
        raise UsageError(
            f"{what} of {given.dtype} cannot be trained on.", "Convert it to torch.float32."
        )
    if not is_finite(given):
        raise UsageError(
            f"{what} has numbers that are not finite.",
            "Look at the loss: a lower learning rate may keep it finite.",
        )


def check_hidden(given: Tensor, size: int) -> None:
    """Refuse hidden states that are not [T, ``size``], or no numbers."""
    check_tensor("The input", given)
    if given.ndim != 2 or given.shape[1] != size:
        raise UsageError(
            f"Hidden states of shape {tuple(given.shape)} cannot be trained on.",
            f"Give floating point numbers of shape (tokens, {size}).",
        )
    check_floats("The input", given)


def row_lengths(given: Sequence[int], tokens: int, most: int) -> tuple[int, ...]:
    """The lengths of rows that make up so many tokens, none above ``most``, as plain numbers: they
    may be numpy's, or those of a tensor."""
    try:
        lengths = tuple(int(index(length)) for length in given)
    except (TypeError, RuntimeError):  # the latter where a tensor has none
        raise UsageError(
            f"The lengths of rows are no whole numbers: {str(given)[:40]}.",
            "Give one for each row: [3, 4].",
        ) from None
    if not lengths or min(lengths) < 1 or sum(lengths) != tokens:
        raise UsageError(
            f"Rows of {sum(lengths)} tokens do not make up {tokens} hidden states.",
            "Give the length of every row, at least 1 each.",
        )
    if max(lengths) > most:
        raise UsageError(
            f"A row has {max(lengths)} tokens; training takes {most} at most.",
            "Cut it into shorter rows.",
        )
    return lengths


def check_blocks(tuning: Tuning, config: ModelConfig) -> None:
    """Refuse what is no tuning, or has parts for blocks that the model has not."""
    if not isinstance(tuning, Tuning):
        raise UsageError(
            f"A {type(tuning).__name__} cannot be added to blocks.",
            "Give a Tuning: parameters have theirs as parameters.tuning().",
        )
    beyond = [block for block in tuning.blocks if not 0 <= block < config.num_blocks]
    if beyond:
        raise UsageError(
            f"The adapter has a part for block {beyond[0]}, but the model has blocks 0 to "
            f"{config.num_blocks - 1}.",
            OTHER_MODEL,
        )


def check_gradient(grad: Tensor, output: Tensor) -> None:
    """Refuse what cannot be the gradient of an output [T, H]."""
    what = "The gradient of the output"
    check_tensor(what, grad)
    if grad.shape != output.shape:
        raise UsageError(
            f"A gradient of shape {tuple(grad.shape)} does not fit an output of shape "
            f"{tuple(output.shape)}.",
            "Give the gradient of what forward returned.",
        )
    check_floats(what, grad)


def check_mask(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """An attention mask as booleans [``batch``, ``tokens``]. Refuses another shape, and numbers
    that are not 0 or 1: a mask to be added to scores means the opposite."""
    check_tensor("The attention mask", mask)
    remedy = "Give one number for each token: 1, or 0 for padding."
    if tuple(mask.shape) != (batch, tokens):
        raise UsageError(
            f"An attention mask of shape {tuple(mask.shape)} does not fit {batch} rows of "
            f"{tokens} tokens.",
            remedy,
        )
    real = mask == 1
    if not bool((real | (mask == 0)).all()):
        raise UsageError("The attention mask has other numbers than 0 and 1.", remedy)
    return real
