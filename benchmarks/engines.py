"""Three ways to compute the same next token: transformers, petalnode's blocks, a swarm.

An engine holds one sequence. ``prefill(n)`` starts it anew with n fixed tokens; ``decode(steps)``
generates from there, greedily, and goes back, so that it can be repeated at the same prefix.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.sampling import Sampler, SamplingConfig
from petalnode.models.span import RowSlice
from petalnode.session.session import GenerateOptions, Session

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decoded:
    """When each token was there (``time.monotonic``), the one before the first step first."""

    at: Sequence[float]
    ids: Sequence[int]


class Engine(Protocol):
    """One sequence of one model."""

    async def prefill(self, tokens: int) -> float:
        """Start anew with this many tokens; seconds until the last one's logits are there."""

    async def decode(self, steps: int) -> Decoded:
        """Generate ``steps`` tokens after one that is not counted, then forget them."""


def prompt(tokens: int, vocab_size: int) -> list[int]:
    """Fixed token ids without a pattern."""
    return [(7919 * index * index + 104729 * index + 13) % vocab_size for index in range(tokens)]


class Transformers:
    """Local transformers: forward with its own cache and argmax, without what generate() adds."""

    def __init__(self, model: Path) -> None:
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._cache: Any = None
        self._ids: list[int] = []

    async def prefill(self, tokens: int) -> float:
        self._ids = prompt(tokens, self._model.config.vocab_size)
        self._cache = None
        started = time.monotonic()
        self._step(self._ids)
        return time.monotonic() - started

    async def decode(self, steps: int) -> Decoded:
        self._cache.crop(-1)
        ids, at = [self._ids[-1]], []
        for _ in range(steps + 1):
            ids.append(self._step(ids[-1:]))
            at.append(time.monotonic())
        self._cache.crop(-steps)
        return Decoded(at, ids[1:])

    @torch.inference_mode()
    def _step(self, ids: list[int]) -> int:
        out = self._model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class Blocks:
    """petalnode's blocks, client parts and sampler in one thread: what a chain has to compute."""

    def __init__(self, model: Path) -> None:
        checkpoint = open_checkpoint(str(model))
        blocks = checkpoint.config.num_blocks
        self._span = load_block_span(checkpoint, 0, blocks, dtype=torch.float32, device=CPU)
        self._client = load_client(checkpoint, dtype=torch.float32, device=CPU)
        self._sampler = Sampler(SamplingConfig())
        self._row = self._span.new_row(0, blocks)
        self._ids: list[int] = []

    async def prefill(self, tokens: int) -> float:
        self._ids = prompt(tokens, self._span.config.vocab_size)
        self._row.truncate(0)
        started = time.monotonic()
        self._step(self._ids)
        return time.monotonic() - started

    async def decode(self, steps: int) -> Decoded:
        self._row.truncate(len(self._ids) - 1)
        ids, at = [self._ids[-1]], []
        for _ in range(steps + 1):
            ids.append(self._step(ids[-1:]))
            at.append(time.monotonic())
        self._row.truncate(len(self._ids))
        return Decoded(at, ids[1:])

    def _step(self, ids: list[int]) -> int:
        hidden = self._client.embed(torch.tensor(ids), torch.arange(len(ids)))
        rows = [RowSlice(self._row, self._row.length, len(ids))]
        hidden = self._span.forward(hidden, rows, 0, self._span.end)
        return self._sampler.sample(self._client.logits(hidden[-1:])[-1], ids)


class OverSwarm:
    """A session of ``petalnode``, as any client uses it."""

    def __init__(self, session: Session, vocab_size: int) -> None:
        self._session = session
        self._vocab_size = vocab_size
        self._prefix = 0

    async def prefill(self, tokens: int) -> float:
        self._session.rollback(0)
        self._prefix = tokens
        started = time.monotonic()
        await self._session.logits(prompt(tokens, self._vocab_size), last=1)
        return time.monotonic() - started

    async def decode(self, steps: int) -> Decoded:
        last = self._session.ids[self._prefix - 1]
        self._session.rollback(self._prefix - 1)
        at, ids = [], []
        async for token in self._session.generate([last], GenerateOptions(steps + 1)):
            at.append(time.monotonic())
            ids.append(token.id)
        self._session.rollback(self._prefix)
        return Decoded(at, ids)
