"""A soft prompt: vectors that a client puts before its text, as positions with ids of their own.

Ids from the vocabulary's size on stand for them, so that sequences, rollback, beams and replays
need not know of any. Source: prompt tuning (arXiv 2104.08691).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petalnode.models.client import ClientParts
from petalnode.models.tuning.check import check_prompt


class PromptedClient(ClientParts):
    """A client's part that knows the ids of a soft prompt ``prompt_PH`` too."""

    def __init__(self, plain: ClientParts, prompt_PH: Tensor) -> None:
        super().__init__(plain.config, plain._client, plain._parts, plain.dtype)
        check_prompt(plain.config, prompt_PH)
        self.prompt_PH = prompt_PH.detach().to(plain.dtype)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that every row begins with."""
        vocab = self.config.vocab_size
        return tuple(range(vocab, vocab + len(self.prompt_PH)))

    @torch.inference_mode()
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See ``ClientParts.embed``; ids of the prompt give its vectors, wherever they stand."""
        vocab = self.config.vocab_size
        virtual = ids >= vocab
        if not bool(virtual.any()):
            return super().embed(ids, positions)
        x_TH = super().embed(torch.where(virtual, 0, ids), positions).clone()
        x_TH[virtual] = self.prompt_PH[ids[virtual] - vocab].to(x_TH.device)
        return x_TH


def prefix_of(client: ClientParts) -> tuple[int, ...]:
    """The ids that every row of a client's begins with: none without a soft prompt."""
    return client.prefix if isinstance(client, PromptedClient) else ()


def without_prompt(ids: Sequence[int], prefix: Sequence[int]) -> Sequence[int]:
    """The tokens of a sequence, for those who count what was said."""
    return ids[len(prefix) :] if prefix else ids
