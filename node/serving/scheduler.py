"""What the span engine computes next: decode, then prefill in chunks, then training. Pure, no I/O.

Work is what one frame asks for: ``tokens`` tokens over some rows. Work of few tokens is *decode*
(one token a row, or a few speculated ones) and is taken whole in the next turn. Everything longer
is *prefill* and gets the turn's token budget, in order of arrival; while sessions decode, that
budget is small and every other turn has none. So a long prompt of one session holds up another
session's next token by one short turn at most. Training waits for both, a step of one block at a
time; where they never leave it a turn, one in ``TURNS_PER_TRAINING_STEP`` is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

DECODE_TOKENS = 8
"""Work of at most this many tokens a row is decode."""
TURN_TOKENS = 256
"""Tokens of prefill in a turn while nobody decodes: enough to keep matrix products efficient."""
TURN_TOKENS_BESIDE_DECODE = 64
"""Tokens of prefill in a turn while sessions decode: this bounds their next token's delay."""
MAX_DECODE_TOKENS = 512
"""Tokens of decode in a turn; more waits for the next turn, in order."""

TURNS_PER_TRAINING_STEP = 8
"""A training job gets a step after so many turns of others: it is slow then, but not starved."""


class Schedulable(Protocol):
    """What the scheduler needs to know of a piece of work."""

    @property
    def left(self) -> int:
        """Tokens not computed yet."""

    @property
    def longest(self) -> int:
        """Tokens of its longest row segment."""


@dataclass(frozen=True)
class Share:
    """The next ``tokens`` tokens of the work at ``index`` of the queue are computed this turn."""

    index: int
    tokens: int


def is_decode(work: Schedulable) -> bool:
    """Whether the work is small enough to go first."""
    return work.longest <= DECODE_TOKENS


def training_is_due(waiting: int, jobs: int, turns: int) -> bool:
    """Whether the next turn is a training step.

    So much other work is ``waiting``, and so many training jobs, which had no step for ``turns``.
    """
    return jobs > 0 and (waiting == 0 or turns >= TURNS_PER_TRAINING_STEP)


def plan_turn(
    queue: Sequence[Schedulable], *, decoding: bool = False, prefill_is_due: bool = True
) -> list[Share]:
    """Which work gets how many tokens this turn. Empty only when the queue is.

    ``decoding`` says that some session decoded a moment ago and will be back with its next token.
    While decode waits, prefill joins in only if it ``prefill_is_due``.
    """
    shares: list[Share] = []
    decode_left = MAX_DECODE_TOKENS
    for index, work in enumerate(queue):
        if is_decode(work) and work.left <= decode_left:
            shares.append(Share(index, work.left))
            decode_left -= work.left
    if shares and not prefill_is_due:
        return shares
    budget = TURN_TOKENS_BESIDE_DECODE if shares or decoding else TURN_TOKENS
    for index, work in enumerate(queue):
        if not is_decode(work) and budget > 0:
            tokens = min(work.left, budget)
            shares.append(Share(index, tokens))
            budget -= tokens
    return shares
