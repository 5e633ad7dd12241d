"""A session: one sequence of tokens, its chain, and generation over it.

The session keeps the token ids; the hops keep the attention caches. ``cached`` is how many of the
ids the hops have: going back is setting it lower (every hop truncates by position), going on is
feeding what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import trio

from petalnode.compute import Compute
from petalnode.errors import UsageError
from petalnode.models.client import ClientParts
from petalnode.models.sampling import Sampler, SamplingConfig
from petalnode.models.text import TextStream
from petalnode.models.tokenizer import Tokenizer
from petalnode.protocol import Segment, Step
from petalnode.session.chain import Chain


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate; the defaults are greedy. ``stop``: texts that end the generation."""

    max_new_tokens: int = 128
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError("There is nothing to generate.", "Ask for at least one new token.")


@dataclass(frozen=True)
class Token:
    """One generated token. ``text`` is what became certain with it, possibly nothing yet."""

    id: int
    text: str
    position: int
    ms: float


class IdsSource:
    """A chain's inputs from token ids: the last resort of a replay, never evicted (see Source)."""

    def __init__(self, client: ClientParts, compute: Compute) -> None:
        self.ids: list[int] = []
        self.client = client
        self.last_seq = self.ordered = 0
        self._compute = compute

    def length(self, row: int) -> int:
        """See ``Source``."""
        return len(self.ids)

    async def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """See ``Source``."""
        ids, positions = torch.tensor(self.ids[start:end]), torch.arange(start, end)
        return await self._compute.run(partial(self.client.embed, ids, positions))

    def record(self, step: Step, hidden: torch.Tensor) -> None:
        """See ``Source``: the ids are remembered as it is."""
        self.last_seq = max(self.last_seq, step.seq)


class Session:
    """One sequence over one chain. Made by ``Node.open_session``; one user at a time."""

    def __init__(
        self, chain: Chain, source: IdsSource, tokenizer: Tokenizer, compute: Compute
    ) -> None:
        self.chain = chain
        self.ids = source.ids
        self.cached = 0
        self.tokenizer = tokenizer
        self._source = source
        self._client = source.client
        self._compute = compute

    @property
    def max_positions(self) -> int:
        """The model's context, in tokens."""
        return self._client.config.max_positions

    @property
    def missing(self) -> int:
        """How many of the ids the hops do not have yet."""
        return len(self.ids) - self.cached

    def rollback(self, position: int) -> None:
        """Forget all tokens from ``position`` on; the hops follow with the next step."""
        if not 0 <= position <= len(self.ids):
            raise UsageError(f"The session has {len(self.ids)} tokens, not {position}.")
        del self.ids[position:]
        self.cached = min(self.cached, position)

    async def logits(self, ids: Sequence[int], *, last: int | None = None) -> torch.Tensor:
        """Append ``ids`` and return float32 logits [n, V] of the last ``last`` of them (or all)."""
        self.append(ids)
        if not self.missing:
            raise UsageError("There are no tokens to compute.", "Give at least one.")
        want = len(ids) if last is None else last
        hidden = await self._forward(await self._embed(), want)
        return await self._compute.run(partial(self._client.logits, hidden))

    def generate(
        self, prompt: str | Sequence[int], options: GenerateOptions | None = None
    ) -> Generation:
        """Append the prompt and generate: ``async for token in session.generate(…)``.

        A text prompt gets the tokenizer's special tokens only at the start of the session.
        """
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special=not self.ids)
        self.append(prompt)
        if not self.missing:
            raise UsageError("The prompt is empty.", "Give at least one token to go on from.")
        return Generation(self, options or GenerateOptions())

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens that the next step will feed.

        Raises ``UsageError`` past the context, or for ids that the model does not have.
        """
        vocab = self._client.config.vocab_size
        if not all(0 <= token < vocab for token in ids):
            raise UsageError("A token id is not the model's.", f"Ids go from 0 to {vocab - 1}.")
        total = len(self.ids) + len(ids)
        if total >= self.max_positions:
            raise UsageError(
                f"The prompt makes {total} tokens, but the model's context is "
                f"{self.max_positions}.",
                "Shorten the prompt.",
            )
        self.ids.extend(ids)

    async def _embed(self) -> torch.Tensor:
        return await self._source.read(0, self.cached, len(self.ids))

    async def _forward(self, hidden: torch.Tensor, want: int) -> torch.Tensor:
        """Feed the embedded ids from ``cached`` on; the last ``want`` outputs [want, H]."""
        n = hidden.shape[0]
        output = await self.chain.forward([Segment(0, self.cached, n, want)], hidden)
        self.cached += n
        return output

    def _choose(self, sampler: Sampler, hidden: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Sample from the last output, and embed the choice. Runs in the worker thread."""
        token = sampler.sample(self._client.logits(hidden)[-1], self.ids)
        position = torch.tensor([len(self.ids)])
        return token, self._client.embed(torch.tensor([token]), position)


class Generation:
    """An async iterator of tokens. After the last one, ``finish_reason`` is stop or length."""

    def __init__(self, session: Session, options: GenerateOptions) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.ttft_s: float | None = None
        self._session = session
        self._options = options
        self._sampler = Sampler(options.sampling)
        self._stream = TextStream(session.tokenizer, options.stop)
        self._embedded: torch.Tensor | None = None
        self._started = self._last = trio.current_time()

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one."""
        if self.ttft_s is None or len(self.tokens) < 2:
            return 0.0
        return (len(self.tokens) - 1) / (self._last - self._started - self.ttft_s)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        session = self._session
        if self.finish_reason is None and len(session.ids) >= session.max_positions:
            self.finish_reason = "length"  # there was no room for even one
        if self.finish_reason is not None:
            raise StopAsyncIteration
        if not session.ids:
            raise UsageError("The session was rolled back to nothing.", "Start a new generation.")
        # Kept only from one undisturbed step to the next: whoever cancels a step, or rolls back
        # between two, is served from the ids. A step whose output was lost is fed again.
        embedded, self._embedded = self._embedded, None
        if embedded is None or session.ids[-1:] != self.tokens[-1:] or session.missing != 1:
            session.cached = min(session.cached, len(session.ids) - 1)
            embedded = await session._embed()
        hidden = await session._forward(embedded, want=1)
        choose = partial(session._choose, self._sampler, hidden)
        token, self._embedded = await session._compute.run(choose)
        session.ids.append(token)
        return self._record(token)

    def _record(self, token: int) -> Token:
        now = trio.current_time()
        if self.ttft_s is None:
            self.ttft_s = now - self._started
        ms, self._last = (now - self._last) * 1000, now
        self.tokens.append(token)
        piece = self._stream.push(token)
        self.finish_reason = self._finished(token)
        if self.finish_reason is not None:
            piece += self._stream.finish()
        self.text += piece
        return Token(token, piece, len(self._session.ids) - 1, ms)

    def _finished(self, token: int) -> str | None:
        if self._stream.stopped or token in self._session.tokenizer.eos_ids:
            return "stop"
        full = len(self._session.ids) >= self._session.max_positions
        return "length" if full or len(self.tokens) >= self._options.max_new_tokens else None
