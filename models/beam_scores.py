"""Which beams go on: the bookkeeping of beam search for one prompt, without the model.

The rules, and so the ids, are those of transformers' ``generate(num_beams=N, do_sample=False)``
with ``early_stopping=False``: per step the likeliest continuations over all beams; those that end
among the best N compete by score / length ** length_penalty; it is over when N have ended and the
best running beam, at its length now, would not beat the worst of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petalnode.errors import ModelError, UsageError


@dataclass(frozen=True)
class Ended:
    """A sequence that reached its end, and what it is worth."""

    score: float
    ids: list[int]


class BeamScores:
    """The beams of one prompt. At first there is one; ``advance`` makes them ``num_beams``.

    ``ids`` are the generated ids of each running beam, best first; ``parents`` says which of the
    beams before ``advance`` each one goes on from. Raises ``UsageError`` for a vocabulary that is
    too small for so many beams.
    """

    def __init__(
        self,
        num_beams: int,
        eos_ids: Collection[int],
        max_new_tokens: int,
        vocab_size: int,
        length_penalty: float = 1.0,
    ) -> None:
        self.ids: list[list[int]] = [[]]
        self.parents: list[int] = [0]
        self.ended: list[Ended] = []
        self.done = False
        self._num_beams, self._eos_ids = num_beams, frozenset(eos_ids)
        self._max_new_tokens, self._length_penalty = max_new_tokens, length_penalty
        self._scores = torch.zeros(1)
        # Each beam has at most one continuation per end-of-sequence id: N others remain.
        self._candidates = max(2, 1 + len(self._eos_ids)) * num_beams
        if self._candidates > vocab_size:
            raise UsageError(
                f"{num_beams} beams are too many for a vocabulary of {vocab_size} tokens.",
                "Search with fewer.",
            )

    def advance(self, log_probs: Tensor) -> None:
        """Go one token further by the log-probabilities [beams, V] in float32 of each beam.

        Raises ``ModelError`` where they are not numbers.
        """
        if log_probs.isnan().any():
            raise ModelError("The model's output is not a number.", "Try --dtype float32.")
        total = log_probs + self._scores[:, None]
        best = total.flatten().topk(self._candidates)
        length = len(self.ids[0]) + 1
        worth = (best.values / length**self._length_penalty).tolist()
        running: list[int] = []
        parents, tokens = [], []
        for place, index in enumerate(best.indices.tolist()):
            parent, token = divmod(index, log_probs.shape[1])
            parents.append(parent)
            tokens.append(token)
            if token not in self._eos_ids and length < self._max_new_tokens:
                running.append(place)
            elif place < self._num_beams:
                self.ended.append(Ended(worth[place], [*self.ids[parent], token]))
        running = running[: self._num_beams]
        self.ended = sorted(self.ended, key=lambda one: -one.score)[: self._num_beams]
        self.ids = [[*self.ids[parents[place]], tokens[place]] for place in running]
        self.parents = [parents[place] for place in running]
        self._scores = best.values[running]
        self.done = not running or self._cannot_improve(worth[running[0]])

    def decided(self) -> list[int]:
        """The generated ids that will not change any more, whatever comes."""
        if self.done:
            return self.ended[0].ids
        return common_prefix([*self.ids, *(one.ids for one in self.ended)])

    def _cannot_improve(self, best_running: float) -> bool:
        return len(self.ended) == self._num_beams and best_running <= self.ended[-1].score


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all sequences begin with."""
    prefix = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return prefix
