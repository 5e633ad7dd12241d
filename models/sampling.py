"""Choosing the next token: greedy, or by temperature, top-k, top-p and repetition penalty.

Order and meaning are those of transformers' logits processors: penalty, temperature, top-k, top-p.
Everything runs in float32 on the CPU, so that equal logits and an equal seed give equal tokens on
every machine of one architecture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petalnode.errors import ModelError, UsageError

MIN_TEMPERATURE = 1e-6  # below, dividing by it leaves the range of float32
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class SamplingConfig:
    """How to choose. Temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off.

    Raises `UsageError` for a value that makes no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise _bad("temperature", self.temperature, f"0 (greedy), or {MIN_TEMPERATURE} or more")
        if type(self.top_k) is not int or self.top_k < 0:
            raise _bad("top-k", self.top_k, "0 (off) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise _bad("top-p", self.top_p, "above 0 and at most 1")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise _bad("repetition penalty", self.repetition_penalty, "above 0; 1 is off")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise _bad("seed", self.seed, f"from 0 to {MAX_SEED}")


def _bad(name: str, value: float, wanted: str) -> UsageError:
    return UsageError(f"The {name} {value} is out of range.", f"It must be {wanted}.")


class Sampler:
    """Chooses the tokens of one row. Holds the row's own random generator."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    @torch.inference_mode()
    def sample(self, logits: Tensor, previous_ids: Sequence[int]) -> int:
        """Return the next token id for logits [V], after the prompt and output `previous_ids`.

        Greedy takes the lowest id of equals. Raises `ModelError` for logits that are not numbers.
        """
        scores = warp(logits, previous_ids, self.config)
        best = int(scores.argmax())
        if not math.isfinite(float(scores[best])):  # NaN counts as the largest
            raise ModelError("The model's output is not a number.", "Try --dtype float32.")
        if self.config.temperature == 0.0:
            return best
        return pick(scores, float(torch.rand((), generator=self._generator, dtype=torch.float64)))


def pick(scores: Tensor, uniform: float) -> int:
    """Draw from softmax(scores): invert its cumulative sum at a number in [0, 1]."""
    cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
    at = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    last = int(torch.searchsorted(cumulative, cumulative[-1]))  # no id behind has any weight
    return min(at, last)


def warp(logits: Tensor, previous_ids: Sequence[int], config: SamplingConfig) -> Tensor:
    """Return float32 scores [V] on the CPU whose softmax is what is sampled from; cut ids are -inf.

    At temperature 0 only the penalty applies: the best score is the choice.
    """
    scores = logits.detach().to("cpu", torch.float32)
    if config.repetition_penalty != 1.0 and previous_ids:
        scores = _penalize(scores, previous_ids, config.repetition_penalty)
    if config.temperature == 0.0:
        return scores
    scores = scores / config.temperature
    if config.top_k:
        scores = _top_k(scores, config.top_k)
    if config.top_p < 1.0:
        scores = _top_p(scores, config.top_p)
    return scores


def _penalize(scores: Tensor, previous_ids: Sequence[int], penalty: float) -> Tensor:
    """Make every id that was there already less likely, once each (CTRL, arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(previous_ids)))
    taken = scores[seen]
    return scores.index_copy(0, seen, torch.where(taken < 0, taken * penalty, taken / penalty))


def _top_k(scores: Tensor, top_k: int) -> Tensor:
    """Keep the k best scores and whatever equals the last of them."""
    kth = scores.topk(min(top_k, len(scores))).values[-1]
    return scores.masked_fill(scores < kth, -math.inf)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep the most likely ids whose probabilities reach top_p together, at least one."""
    ordered, ids = scores.sort(stable=True)  # ascending, as transformers does: the tail is cut
    cut = torch.softmax(ordered, -1).cumsum(-1) <= 1.0 - top_p
    cut[-1] = False
    return scores.masked_fill(torch.zeros_like(cut).index_copy(0, ids, cut), -math.inf)
