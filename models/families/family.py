"""What a family of models is to the rest of petalnode, and the client's part that most share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from petalnode.models.config import ConfigReader, ModelConfig
from petalnode.models.layers.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.parts import Layer
    from petalnode.models.layers.ragged import RaggedBatch

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Block(Protocol):
    """One block. It keeps no state but its weights."""

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the output [T, H] of a ragged batch; rows' caches are extended, not advanced."""


class Client(Protocol):
    """What stays with the client: everything before the first block and after the last."""

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Return hidden states [T, H] of token ids at their positions in their rows."""

    def normed(self, x_TH: Tensor) -> Tensor:
        """Return what the head is given of hidden states as the last block left them."""

    def logits(self, x_TH: Tensor) -> Tensor:
        """Return logits [T, V] of hidden states as the last block left them."""


@dataclass(frozen=True)
class Family:
    """One value of `model_type`, and how to read, build and find its models.

    `block(parts, config, index)` and `client(parts, config)` name their tensors without the
    block's prefix, which is `blocks` with the index in it. A checkpoint may write any of `roots`
    where the names here have the first.
    """

    name: str
    read: Callable[[ConfigReader], ModelConfig]
    block: Callable[[Parts, Any, int], Block]
    client: Callable[[Parts, Any], Client]
    blocks: str = "model.layers.{}."
    roots: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = ()
    """Endings of names of tensors that carry nothing for us."""
    apart: tuple[str, ...] = ()
    """Beginnings of names of tensors of other models in the same files: towers for images."""
    quantized: tuple[str, ...] = ()
    """Values of quant_method that `read` knows; others are refused before."""
    modules: str = ""
    """What transformers' module names of a block begin with, where that is not `blocks`."""
    plain_embeddings: bool = True
    """Whether the first block sees embeddings as they are looked up (and scaled)."""


class SimpleClient:
    """Token embeddings times `scale`, final norm, head; a tied head is the embeddings.

    `softcap`: logits become softcap * tanh(logits / softcap).
    """

    def __init__(
        self,
        parts: Parts,
        config: ModelConfig,
        norm: Layer,
        *,
        embed: str = EMBED,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self._table = parts.vocabulary(embed, config.vocab_size, config.hidden_size)
        self._head = (
            self._table
            if config.tie_embeddings
            else parts.vocabulary(HEAD, config.vocab_size, config.hidden_size)
        )
        self._norm, self._scale, self._softcap = norm, scale, softcap

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """See `Client.embed`; positions do not matter here."""
        x_TH = self._table.lookup(ids_T)
        if self._scale == 1.0:
            return x_TH
        return x_TH * x_TH.new_tensor(self._scale)  # rounded to the dtype, as it was in training

    def normed(self, x_TH: Tensor) -> Tensor:
        """See `Client.normed`."""
        return self._norm(x_TH)

    def logits(self, x_TH: Tensor) -> Tensor:
        """See `Client.logits`."""
        logits_TV = self._head.project(self.normed(x_TH))
        if self._softcap is None:
            return logits_TV
        return (logits_TV / self._softcap).tanh() * self._softcap
