"""What a client holds of a model: token embeddings, final norm, head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.errors import LocalProtocolError
from petalnode.models.config import ModelConfig
from petalnode.models.linear import linear


class ClientParts:
    """Embeddings [V, H], norm [H] and head [V, H] in one dtype; a tied head is the embeddings."""

    def __init__(self, config: ModelConfig, embed: Tensor, norm: Tensor, head: Tensor) -> None:
        self.config = config
        self._embed, self._norm, self._head = embed, norm, head

    @property
    def param_bytes(self) -> int:
        """Bytes of all weights held; a tied head counts once."""
        kept = {t.data_ptr(): t for t in (self._embed, self._norm, self._head)}
        return sum(t.numel() * t.element_size() for t in kept.values())

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Return hidden states [T, H] of token ids [T] (int64)."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise LocalProtocolError("A token id lies outside the vocabulary.")
        return F.embedding(ids.to(self._embed.device), self._embed)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [T, V] in float32 of hidden states [T, H] as the last block left them."""
        hidden = hidden.to(dtype=self._norm.dtype, device=self._norm.device)
        normed = F.rms_norm(hidden, self._norm.shape, self._norm, self.config.norm_eps)
        return linear(normed, self._head, None).float()
