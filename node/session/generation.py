"""What a generation is asked, what it gives, and the plain kind: one row, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import trio

from petalnode.errors import UsageError
from petalnode.models.sampling import Sampler, SamplingConfig
from petalnode.models.text import TextStream
from petalnode.protocol import MAX_ROWS

if TYPE_CHECKING:
    from petalnode.session.session import Session


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate; the defaults are greedy. ``stop``: texts that end the generation.

    ``num_beams`` above 1 searches as transformers does with ``do_sample=False``, sequences compared
    by score / length ** ``length_penalty``. Raises ``UsageError`` for what makes no sense.
    """

    max_new_tokens: int = 128
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError("There is nothing to generate.", "Ask for at least one new token.")
        if type(self.num_beams) is not int or not 1 <= self.num_beams <= MAX_ROWS:
            raise UsageError(
                f"A search cannot have {self.num_beams} beams.", f"Use 1 to {MAX_ROWS}."
            )
        if not math.isfinite(self.length_penalty):
            raise UsageError("The length penalty is not a number.", "1 is usual.")
        if self.num_beams > 1 and self.sampling.temperature != 0:
            raise UsageError("Beam search does not sample.", "Leave the temperature at 0.")
        if self.num_beams > 1 and self.stop:
            raise UsageError("Beam search does not stop at texts.", "Leave the stop texts out.")


@dataclass(frozen=True)
class Token:
    """One generated token. ``text`` is what became certain with it, possibly nothing yet.

    ``position`` in its sequence, the prompt included; ``ms`` since the token before it.
    """

    id: int
    text: str
    position: int
    ms: float


class Completion:
    """What was generated after one prompt. In the end ``finish_reason`` is stop or length."""

    def __init__(self, session: Session, options: GenerateOptions) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.ttft_s: float | None = None
        self._session = session
        self.options = options
        self._stream = TextStream(session.tokenizer, options.stop)
        self._started = self._last = trio.current_time()

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one."""
        if self.ttft_s is None or len(self.tokens) < 2:
            return 0.0
        return (len(self.tokens) - 1) / max(self._last - self._started - self.ttft_s, 1e-9)

    def record(self, token: int, position: int) -> Token:
        """Take the next token, at its position; it may be the last."""
        now = trio.current_time()
        if self.ttft_s is None:
            self.ttft_s = now - self._started
        ms, self._last = (now - self._last) * 1000, now
        self.tokens.append(token)
        piece = self._stream.push(token)
        self.finish_reason = self._finished(token, position)
        if self.finish_reason is not None:
            piece += self._stream.finish()
        self.text += piece
        return Token(token, piece, position, ms)

    def _finished(self, token: int, position: int) -> str | None:
        if self._stream.stopped or token in self._session.tokenizer.eos_ids:
            return "stop"
        full = position + 1 >= self._session.max_positions
        return "length" if full or len(self.tokens) >= self.options.max_new_tokens else None


class Generation(Completion):
    """An async iterator of tokens, over the session's own row."""

    def __init__(self, session: Session, options: GenerateOptions) -> None:
        super().__init__(session, options)
        self._sampler = Sampler(options.sampling)
        self._embedded: torch.Tensor | None = None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        session = self._session
        if self.finish_reason is None and len(session.ids) >= session.max_positions:
            self.finish_reason = "length"  # there was no room for even one
        if self.finish_reason is not None:
            raise StopAsyncIteration
        if len(session.ids) == len(session.prefix):
            raise UsageError("The session was rolled back to nothing.", "Start a new generation.")
        # Kept only from one undisturbed step to the next: whoever cancels a step, or rolls back
        # between two, is served from the ids. A step whose output was lost is fed again.
        embedded, self._embedded = self._embedded, None
        if embedded is None or session.ids[-1:] != self.tokens[-1:] or session.missing != 1:
            session.cached = min(session.cached, len(session.ids) - 1)
            embedded = await session.embed_missing()
        hidden = await session.feed(embedded, want=1)
        choose = partial(session.choose, self._sampler, hidden)
        token, self._embedded = await session.compute.run(choose)
        session.ids.append(token)
        return self.record(token, len(session.ids) - 1)
