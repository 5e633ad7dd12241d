"""Several rows of one session at once: the beams of a search, or a batch of prompts.

Each prompt has a group of rows next to each other, one or as many as beams. One step feeds every
group that still generates, each row at its own position and attending to itself alone, so that
nothing depends on what else is in the batch. A prompt is fed once, whatever its beams: the first
rearrangement (``Step.order``) makes them out of its one row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from petalnode.errors import UsageError
from petalnode.models.beam_scores import BeamScores
from petalnode.models.sampling import Sampler, SamplingConfig, warp
from petalnode.protocol import Segment
from petalnode.session.generation import Completion, GenerateOptions, Generation, Token
from petalnode.session.soft_prompt import without_prompt

if TYPE_CHECKING:
    from petalnode.session.session import Session


class Sampled:
    """One row's choices, greedy or sampled. ``tokens`` are to be fed next, one a row."""

    def __init__(self, prompt: Sequence[int], sampling: SamplingConfig) -> None:
        self.parents = [0]
        self.tokens: list[int] = []
        self._ids = list(prompt)
        self._sampler = Sampler(sampling)

    def advance(self, logits: torch.Tensor) -> list[int]:
        """The ids that logits [rows, V] decide."""
        self.tokens = [self._sampler.sample(logits[0], self._ids)]
        self._ids += self.tokens
        return self.tokens


class Beams:
    """The rows of a beam search; row i goes on from what row ``parents[i]`` was."""

    def __init__(self, prompt: Sequence[int], scores: BeamScores, sampling: SamplingConfig) -> None:
        self.parents: list[int] = []
        self.tokens: list[int] = []
        self._prompt, self._scores, self._sampling = list(prompt), scores, sampling
        self._decided = 0

    def advance(self, logits: torch.Tensor) -> list[int]:
        """The ids that logits [rows, V] decide, possibly none."""
        log_probs = torch.log_softmax(logits.float().cpu(), -1)
        beams = zip(log_probs, self._scores.ids, strict=True)
        warped = [warp(one, [*self._prompt, *ids], self._sampling) for one, ids in beams]
        self._scores.advance(torch.stack(warped))
        self.parents = self._scores.parents
        self.tokens = [ids[-1] for ids in self._scores.ids]
        decided = self._scores.decided()[self._decided :]
        self._decided += len(decided)
        return decided


class Group:
    """One prompt of a batch: its rows from ``first`` on, who chooses, and what came of it."""

    def __init__(
        self, session: Session, first: int, prompt: Sequence[int], completion: Completion
    ) -> None:
        options = completion.options
        self.first, self.prompt, self.completion = first, prompt, completion
        self.outputs = 1
        """Rows that were fed in the last step."""
        self.choice: Sampled | Beams
        said = without_prompt(prompt, session.prefix)
        if options.num_beams == 1:
            self.choice = Sampled(said, options.sampling)
            return
        scores = BeamScores(
            options.num_beams,
            session.tokenizer.eos_ids,
            min(options.max_new_tokens, session.max_positions - len(prompt)),
            session.client.config.vocab_size,
            options.length_penalty,
        )
        self.choice = Beams(said, scores, options.sampling)

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def record(self, token: int) -> Token:
        """Take a token that was decided."""
        return self.completion.record(token, len(self.prompt) + len(self.completion.tokens))


class Batch:
    """An async iterator of ``(prompt index, token)``; ``completions`` in the order of prompts.

    Prompts that are done take no more part. A batch that was interrupted in a step, by cancelling
    it for example, cannot go on: then ``UsageError``.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
        completions: Sequence[Completion] = (),
        cached: int = 0,
    ) -> None:
        self.completions = list(completions) or [Completion(session, options) for _ in prompts]
        self._session, self._cached = session, cached
        self._groups = [
            Group(session, index * options.num_beams, prompt, completion)
            for index, (prompt, completion) in enumerate(
                zip(prompts, self.completions, strict=True)
            )
        ]
        self._rows: list[list[int]] | None = None
        self._ready: deque[tuple[int, Token]] = deque()
        self._in_step = False

    def __aiter__(self) -> Batch:
        return self

    async def __anext__(self) -> tuple[int, Token]:
        while not self._ready:
            if all(group.done for group in self._groups):
                raise StopAsyncIteration
            await self._step()
        return self._ready.popleft()

    async def _step(self) -> None:
        """Feed every group that is not done, and take what its outputs decide."""
        source = self._session.source
        if self._in_step or (self._rows is not None and self._rows is not source.rows):
            raise UsageError(
                "The generation was interrupted, or its session used for something else.",
                "Start a new one.",
            )
        self._in_step = True
        live = [(index, group) for index, group in enumerate(self._groups) if not group.done]
        groups = [group for _, group in live]
        segments, order, fed = self._prompts() if self._rows is None else self._next(groups)
        compute = self._session.compute
        hidden = await compute.run(partial(self._embed, fed, segments))
        output = await self._session.chain.forward(segments, hidden, order)
        decided = await compute.run(partial(self._advance, groups, output))
        for (index, group), tokens in zip(live, decided, strict=True):
            self._ready += [(index, group.record(token)) for token in tokens]
        self._in_step = False

    def _prompts(self) -> tuple[list[Segment], tuple[int, ...], list[int]]:
        """Each prompt into the first row of its group, but for what is cached there."""
        source = self._session.source
        self._rows = source.rows = list(source.rows)
        segments: list[Segment] = []
        fed: list[int] = []
        for group in self._groups:
            self._rows[group.first] = list(group.prompt)
            fed += group.prompt[self._cached :]
            n = len(group.prompt) - self._cached
            segments.append(Segment(group.first, self._cached, n, 1))
        return segments, (), fed

    def _next(self, groups: Sequence[Group]) -> tuple[list[Segment], tuple[int, ...], list[int]]:
        """One more token for each row that goes on, and from which row it does."""
        before = self._session.source.rows
        after, order = list(before), list(range(len(before)))
        segments, fed = [], []
        for group in groups:
            group.outputs = len(group.choice.tokens)
            for beam, token in enumerate(group.choice.tokens):
                row, parent = group.first + beam, group.first + group.choice.parents[beam]
                segments.append(Segment(row, len(before[parent]), 1, 1))
                after[row] = [*before[parent], token]
                order[row] = parent
                fed.append(token)
        self._rows = after
        if order == list(range(len(order))):
            self._session.source.rows = after
            return segments, (), fed
        self._session.source.planned = after  # for when the step is on its way
        return segments, tuple(order), fed

    def _embed(self, fed: Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
        positions = [torch.arange(s.position, s.position + s.n) for s in segments]
        return self._session.client.embed(torch.tensor(fed), torch.cat(positions))

    def _advance(self, groups: Sequence[Group], output: torch.Tensor) -> list[list[int]]:
        """What each group decides from its outputs. Runs in the worker thread."""
        logits = self._session.client.logits(output)
        parts = torch.split(logits, [group.outputs for group in groups])
        return [group.choice.advance(part) for group, part in zip(groups, parts, strict=True)]


class BeamGeneration(Generation):
    """Beam search that goes on from a session's own sequence, and leaves it with the best one."""

    def __init__(self, session: Session, options: GenerateOptions) -> None:
        super().__init__(session, options)
        self._batch: Batch | None = None

    async def __anext__(self) -> Token:
        session = self._session
        if self._batch is None:
            cached, session.cached = min(session.cached, len(session.ids) - 1), 0
            self._batch = Batch(session, [list(session.ids)], self.options, [self], cached)
        _, token = await anext(self._batch)
        session.ids.append(token.id)
        if self.finish_reason is not None:
            session.cached = min(session.chain.committed[0], len(session.ids))
        return token
