"""A session: sequences of tokens, their chain, and generation over it.

The session keeps the token ids; the hops keep the attention caches. ``cached`` is how many of the
ids the hops have: going back is setting it lower (every hop truncates by position), going on is
feeding what is missing. The session's own sequence is row 0; beams and batches use the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from petalnode.compute import Compute
from petalnode.errors import UsageError
from petalnode.models.beam_scores import common_prefix
from petalnode.models.client import ClientParts
from petalnode.models.sampling import Sampler
from petalnode.models.tokenizer import Tokenizer
from petalnode.protocol import MAX_ROWS, Segment, Step
from petalnode.session.batch import Batch, BeamGeneration
from petalnode.session.chain import Chain
from petalnode.session.generation import GenerateOptions, Generation, Token
from petalnode.session.soft_prompt import prefix_of, without_prompt

__all__ = ["GenerateOptions", "Generation", "IdsSource", "Session", "Token"]


class IdsSource:
    """A chain's inputs from token ids: the last resort of a replay, never evicted (see Source).

    ``rows`` are what was fed, or is about to be. A step that rearranges them brings its own,
    ``planned`` by who sends it: a replay before that step still needs those from before.
    """

    complete = True

    def __init__(self, client: ClientParts, compute: Compute, rows: int = 1) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.planned: list[list[int]] | None = None
        self.client = client
        self.last_seq = self.ordered = 0
        self._compute = compute

    def length(self, row: int) -> int:
        """See ``Source``."""
        return len(self.rows[row])

    async def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """See ``Source``."""
        ids, positions = torch.tensor(self.rows[row][start:end]), torch.arange(start, end)
        return await self._compute.run(partial(self.client.embed, ids, positions))

    def record(self, step: Step, hidden: torch.Tensor) -> None:
        """See ``Source``: the ids are remembered as it is."""
        self.last_seq = max(self.last_seq, step.seq)
        if step.order and step.seq > self.ordered:
            assert self.planned is not None
            self.rows, self.planned = self.planned, None
            self.ordered = step.seq


class Session:
    """One sequence over one chain. Made by ``Node.open_session``; one user at a time.

    ``ids`` begin with those of the soft prompt, ``prefix``, where there is one; positions count it.
    """

    def __init__(
        self, chain: Chain, source: IdsSource, tokenizer: Tokenizer, compute: Compute
    ) -> None:
        self.chain = chain
        self.prefix = prefix_of(source.client)
        self.ids: list[int] = list(self.prefix)
        self.cached = 0
        self.tokenizer = tokenizer
        self.source = source
        self.compute = compute
        self.client = source.client
        self._own_row()

    @property
    def max_positions(self) -> int:
        """The model's context, in tokens."""
        return self.client.config.max_positions

    @property
    def missing(self) -> int:
        """How many of the ids the hops do not have yet."""
        return len(self.ids) - self.cached

    def rollback(self, position: int) -> None:
        """Forget all tokens from ``position`` on; the hops follow with the next step.

        Raises ``UsageError`` for a position that the session does not have, or in a soft prompt.
        """
        if not len(self.prefix) <= position <= len(self.ids):
            raise UsageError(
                f"The session has {len(self.ids)} tokens; {position} is none to go back to.",
                f"Go back to a position from {len(self.prefix)} to {len(self.ids)}.",
            )
        self._own_row()
        del self.ids[position:]
        self.cached = min(self.cached, position)

    async def logits(self, ids: Sequence[int], *, last: int | None = None) -> torch.Tensor:
        """Append ``ids`` and return float32 logits [n, V] of the last ``last`` of them (or all)."""
        self.append(ids)
        if not self.missing:
            raise UsageError("There are no tokens to compute.", "Give at least one.")
        want = len(ids) if last is None else last
        hidden = await self.feed(await self.embed_missing(), want)
        return await self.compute.run(partial(self.client.logits, hidden))

    def generate(
        self, prompt: str | Sequence[int], options: GenerateOptions | None = None
    ) -> Generation:
        """Append the prompt and generate: ``async for token in session.generate(…)``.

        A text prompt gets the tokenizer's special tokens only at the start of the session. Beam
        search gives tokens when no beam contradicts them any more, the last ones at its end.
        Raises ``UsageError`` for a prompt that is empty or too long, or for more beams than the
        session has rows.
        """
        options = options or GenerateOptions()
        self._check_rows(options.num_beams)
        if isinstance(prompt, str):
            start = len(self.ids) == len(self.prefix)
            prompt = self.tokenizer.encode(prompt, add_special=start)
        self.append(prompt)
        if len(self.ids) == len(self.prefix) or not (self.missing or options.num_beams > 1):
            raise UsageError("The prompt is empty.", "Give at least one token to go on from.")
        return (BeamGeneration if options.num_beams > 1 else Generation)(self, options)

    def generate_batch(
        self, prompts: Sequence[str | Sequence[int]], options: GenerateOptions | None = None
    ) -> Batch:
        """Generate after several prompts at once, each exactly as it would be alone.

        ``async for index, token in session.generate_batch(…)``; then ``completions[index]`` has
        each text. What the session had before is forgotten. Needs a row for each prompt, or for
        each beam of each. Raises ``UsageError`` as ``generate`` does, before anything changes.
        """
        options = options or GenerateOptions()
        self._check_rows(len(prompts) * options.num_beams)
        every = [
            self.tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        if not every or not all(map(len, every)):
            raise UsageError("A prompt is empty.", "Give at least one token to each.")
        for ids in every:
            self._check_ids(ids, len(self.prefix) + len(ids))
        self.rollback(len(self.prefix))
        return Batch(self, [[*self.prefix, *ids] for ids in every], options)

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens that the next step will feed.

        Raises ``UsageError`` past the context, or for ids that the model does not have.
        """
        self._check_ids(ids, len(self.ids) + len(ids))
        self._own_row()
        self.ids.extend(ids)

    async def embed_missing(self) -> torch.Tensor:
        """Hidden states [n, H] of the ids that the hops do not have."""
        return await self.source.read(0, self.cached, len(self.ids))

    async def feed(self, hidden: torch.Tensor, want: int) -> torch.Tensor:
        """Feed the embedded ids from ``cached`` on; the last ``want`` outputs [want, H]."""
        n = hidden.shape[0]
        output = await self.chain.forward([Segment(0, self.cached, n, want)], hidden)
        self.cached += n
        return output

    def choose(self, sampler: Sampler, hidden: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Sample from the last output, and embed the choice. Runs in the worker thread."""
        said = without_prompt(self.ids, self.prefix)
        token = sampler.sample(self.client.logits(hidden)[-1], said)
        position = torch.tensor([len(self.ids)])
        return token, self.client.embed(torch.tensor([token]), position)

    def _own_row(self) -> None:
        """Take row 0 back from a search: what it has in common with the ids stays cached."""
        row = self.source.rows[0]
        if row is not self.ids:
            self.cached = min(self.cached, len(common_prefix([row, self.ids])))
            self.source.rows[0] = self.ids

    def _check_rows(self, rows: int) -> None:
        if rows > self.chain.rows:
            raise UsageError(
                f"{rows} rows are needed, but the session has {self.chain.rows}.",
                "Open it with as many rows as prompts times beams.",
            )

    def _check_ids(self, ids: Sequence[int], total: int) -> None:
        vocab = self.client.config.vocab_size
        if not all(0 <= token < vocab for token in ids):
            raise UsageError("A token id is not the model's.", f"Ids go from 0 to {vocab - 1}.")
        if total >= self.max_positions:
            virtual = f", {len(self.prefix)} of them the adapter's," if self.prefix else ","
            raise UsageError(
                f"The prompt makes {total} tokens{virtual} but the model's context is "
                f"{self.max_positions}.",
                "Shorten the prompt.",
            )


def check_rows(rows: int) -> None:
    """Raise ``UsageError`` if no session can have so many rows."""
    if type(rows) is not int or not 1 <= rows <= MAX_ROWS:
        raise UsageError(
            f"A session cannot have {rows} rows.",
            f"Ask for 1 to {MAX_ROWS}: prompts times beams.",
        )
