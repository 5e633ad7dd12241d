"""What a client holds of a model: token embeddings, final norm, head."""

import torch
from torch import Tensor

from petalnode.errors import LocalProtocolError
from petalnode.models.config import ModelConfig
from petalnode.models.families.family import Client
from petalnode.models.layers.weights import TorchParts


class ClientParts:
    """A family's client with its weights filled by `parts`; hidden states in `dtype`."""

    def __init__(
        self, config: ModelConfig, client: Client, parts: TorchParts, dtype: torch.dtype
    ) -> None:
        self.config, self.dtype = config, dtype
        self._client, self._parts = client, parts

    @property
    def param_bytes(self) -> int:
        """Bytes of all weights held; a tied head counts once."""
        return self._parts.nbytes

    @torch.inference_mode()
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return hidden states [T, H] of token ids [T] (int64) at positions [T] of their rows."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise LocalProtocolError("A token id lies outside the vocabulary.")
        return self._client.embed(ids, positions)

    @torch.no_grad()
    def embed_trainable(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return what `embed` does, as a tensor that autograd takes; the weights stay frozen."""
        return self.embed(ids, positions).clone()

    def logits_trainable(self, hidden: Tensor) -> Tensor:
        """Return what `logits` does, with a graph back to `hidden`."""
        return self._client.logits(hidden.to(dtype=self.dtype, device=self._parts.device)).float()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [T, V] in float32 of hidden states [T, H] as the last block left them."""
        return self.logits_trainable(hidden)
