"""What every family must show against transformers, float32, on tiny random checkpoints.

Each check takes a checkpoint's directory and transformers' model of it, and returns the largest
difference of a logit that it saw. `python -m benchmarks parity` prints them; tests bound them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import Local, reference_generate, reference_logits

TOLERANCE = 1e-4


def prompt(length: int, vocab: int, seed: int = 5) -> list[int]:
    """Return random token ids from 2 on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


def _vocab(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference; logits that hardly differ among themselves show nothing."""
    assert float(theirs.std()) > 0.1, "logits that hardly differ show nothing"
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def whole_prompt(path: Path, model: Any) -> float:
    """A prompt at once."""
    ids = prompt(150, _vocab(model))
    local = Local(path)
    return difference(local.step([local.row()], [ids]), reference_logits(model, ids))


def split_at_every_block(path: Path, model: Any) -> float:
    """Every boundary alone, and all of them."""
    ids = prompt(40, _vocab(model))
    expected = reference_logits(model, ids)
    blocks = Local(path).checkpoint.config.num_blocks
    cuts: list[Sequence[int]] = [[cut] for cut in range(1, blocks)]
    worst = 0.0
    for cut in [*cuts, range(1, blocks)]:
        local = Local(path, cuts=cut)
        worst = max(worst, difference(local.step([local.row()], [ids]), expected))
    return worst


def step_by_step(path: Path, model: Any) -> float:
    """One token at a time, then what chunks make of it."""
    ids = prompt(70, _vocab(model))
    expected = reference_logits(model, ids)
    local = Local(path)
    row = local.row()
    steps = torch.cat([local.step([row], [[one]]) for one in ids])
    row = local.row()
    chunks = [ids[:1], ids[1:33], ids[33:36], ids[36:]]
    chunked = torch.cat([local.step([row], [chunk]) for chunk in chunks])
    return max(difference(steps, expected), difference(chunked, expected))


def unequal_rows(path: Path, model: Any) -> float:
    """A prefill, two decodes and a later chunk in one ragged batch; then a decode of all."""
    local, vocab = Local(path), _vocab(model)
    texts = [prompt(n, vocab, seed=n) for n in (30, 12, 81, 50)]
    held = [0, 11, 80, 20]
    rows = [local.row() for _ in texts]
    for row, text, count in zip(rows, texts, held, strict=True):
        if count:
            local.step([row], [text[:count]])
    new = [text[count:-1] or text[count:] for text, count in zip(texts, held, strict=True)]
    ours = local.step(rows, new)
    wanted = [
        reference_logits(model, text)[count : count + len(fed)]
        for text, count, fed in zip(texts, held, new, strict=True)
    ]
    first = difference(ours, torch.cat(wanted))
    last = local.step(rows, [[text[-1]] for text in texts])
    fed = [text[: count + len(n)] for text, count, n in zip(texts, held, new, strict=True)]
    again = [
        reference_logits(model, [*done, text[-1]])[-1:]
        for done, text in zip(fed, texts, strict=True)
    ]
    return max(first, difference(last, torch.cat(again)))


def greedy_tokens(path: Path, model: Any, new_tokens: int = 60) -> tuple[list[int], list[int]]:
    """Return ours, of a model cut in two, and theirs."""
    ids = prompt(9, _vocab(model))
    ours = Local(path, cuts=(1,)).generate(ids, new_tokens)
    return ours, reference_generate(model, ids, new_tokens)


def half_error(path: Path, model: Any, theirs: Any, dtype: str = "bfloat16") -> tuple[float, float]:
    """Return how far ours and theirs in `dtype` are from float32: relative 2-norms of logits.

    Medians over the tokens: a token whose router chooses another expert by rounding is far off.
    """
    ids = prompt(60, _vocab(model))
    local = Local(path, dtype=dtype)
    row = local.row()
    steps = [ids[:50], ids[50:58], ids[58:59], ids[59:]]
    ours = torch.cat([local.step([row], [chunk]) for chunk in steps])
    exact = reference_logits(model, ids)
    pair = (ours, reference_logits(theirs, ids))
    first, second = (((one - exact).norm(dim=-1) / exact.norm(dim=-1)).median() for one in pair)
    return float(first), float(second)


LOGIT_CHECKS = (whole_prompt, split_at_every_block, step_by_step, unequal_rows)
