"""What stays with the client, as ordinary modules: embeddings, final norm, head.

The family's own client (`petalnode.models.families`) computes with them, so that scaled embeddings,
learned positions and capped logits are what they are everywhere else. Weights begin frozen: they
are buffers, so that ``parameters()`` lists what is trained and nothing else. ``unfreeze`` makes
those of one module parameters, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petalnode.errors import UsageError
from petalnode.models import layout
from petalnode.models.checkpoint import Checkpoint
from petalnode.models.families import family_of
from petalnode.models.finite import is_finite
from petalnode.models.layers.weights import VOCABULARY_SLICE, ConvertedProduct, TorchParts


class FrozenModule(nn.Module):
    """Tensors that are buffers until they are to be trained. ``dtype`` is that of activations."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.activations = dtype

    def fill(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of the checkpoint's tensor."""
        self.register_buffer(name, tensor.to(self.activations, copy=True))


class VocabularyTable(FrozenModule):
    """Token embeddings or head [V, H], in the checkpoint's dtype where that is smaller."""

    weight: Tensor

    def fill(self, name: str, tensor: Tensor) -> None:
        """See ``FrozenModule.fill``."""
        smaller = min(tensor.dtype, self.activations, key=lambda dtype: dtype.itemsize)
        self.register_buffer(name, tensor.to(smaller, copy=True))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [.., H] of token ids."""
        return F.embedding(ids.to(self.weight.device), self.weight).to(self.activations)

    def lookup(self, ids: Tensor) -> Tensor:
        """See ``layers.parts.Vocabulary``. What is embedded already goes through."""
        if ids.is_floating_point():
            return ids.to(self.weight.device, self.activations)
        rows: Tensor = self(ids)
        return rows

    def project(self, x: Tensor) -> Tensor:
        """See ``layers.parts.Vocabulary``."""
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight).float()
        if x.requires_grad and torch.is_grad_enabled() and not self.weight.requires_grad:
            logits: Tensor = ConvertedProduct.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return logits
        slices = torch.split(self.weight, VOCABULARY_SLICE)
        return torch.cat([F.linear(x, one.to(x.dtype)).float() for one in slices], -1)


class RmsNorm(FrozenModule):
    """x / rms(x) * weight; in float32 for Gemma, whose weights in files lack one."""

    weight: Tensor

    def __init__(self, dtype: torch.dtype, eps: float, *, plus_one: bool) -> None:
        super().__init__(dtype)
        self._eps, self._plus_one = eps, plus_one

    def fill(self, name: str, tensor: Tensor) -> None:
        """See ``FrozenModule.fill``."""
        rounded = tensor.to(self.activations, copy=True)
        self.register_buffer(name, rounded.float() + 1.0 if self._plus_one else rounded)

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., H] of [.., H]."""
        wide = x.float() if self._plus_one else x
        size = (x.shape[-1],)
        return F.rms_norm(wide, size, self.weight.to(wide.dtype), self._eps).to(x.dtype)


class LayerNorm(FrozenModule):
    """LayerNorm over the last dimension."""

    def __init__(self, dtype: torch.dtype, eps: float) -> None:
        super().__init__(dtype)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., H] of [.., H]."""
        weight: Tensor | None = getattr(self, "weight", None)
        bias: Tensor | None = getattr(self, "bias", None)
        size = (x.shape[-1],)
        if weight is None or bias is None:
            return F.layer_norm(x, size, eps=self._eps)
        return F.layer_norm(x, size, weight.to(x.dtype), bias.to(x.dtype), self._eps)


class Linear(FrozenModule):
    """x @ weight.T."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., out] of [.., in]."""
        return F.linear(x, self.weight.to(x.dtype))


M = TypeVar("M", bound=FrozenModule)


class ModuleParts(TorchParts):
    """Makes the layers that clients ask for as modules, by the last word of their names."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, torch.device("cpu"))
        self.modules: dict[str, FrozenModule] = {}
        self.tables: list[VocabularyTable] = []
        self._activations = dtype

    def linear(
        self,
        names: str | Sequence[str],
        outputs: int | Sequence[int],
        inputs: int,
        *,
        bias: bool = False,
        **rest: Any,
    ) -> Linear:
        """See `Parts.linear`; clients ask for plain ones."""
        assert isinstance(names, str)
        assert not bias
        return self._add(names, Linear(self._activations), "weight")

    def rms_norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> RmsNorm:
        """See `Parts.rms_norm`."""
        return self._add(name, RmsNorm(self._activations, eps, plus_one=plus_one), "weight")

    def layer_norm(self, name: str, size: int, eps: float, *, affine: bool = True) -> LayerNorm:
        """See `Parts.layer_norm`."""
        tensors = ("weight", "bias") if affine else ()
        return self._add(name, LayerNorm(self._activations, eps), *tensors)

    def vocabulary(self, name: str, size: int, hidden: int) -> Any:
        """See `Parts.vocabulary`."""
        table = VocabularyTable(self._activations)
        self.tables.append(table)
        return self._add(name.removesuffix(".weight"), table, "weight")

    def _add(self, name: str, module: M, *tensors: str) -> M:
        for tensor in tensors:
            self.targets[f"{name}.{tensor}"] = partial(module.fill, tensor)
        self.modules[name.rpartition(".")[2]] = module
        return module


class LocalModules(nn.ModuleDict):
    """The client's part of a model, loaded. Its modules have the checkpoint's own last names."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = checkpoint.config
        parts = ModuleParts(dtype)
        client = family_of(config).client(parts, config)
        checkpoint.fetch(client=True)
        for name, tensor in checkpoint.tensors(layout.client_layout(config)):
            parts.targets[name](tensor)
        super().__init__(dict(parts.modules))
        self._client, self._config = client, config
        self._ends = (parts.tables[0], parts.tables[0 if config.tie_embeddings else -1])
        self.dtype = dtype

    @property
    def embeddings(self) -> VocabularyTable:
        """Token embeddings."""
        return self._ends[0]

    @property
    def head(self) -> VocabularyTable:
        """What makes logits: the embeddings themselves where the model ties the two."""
        return self._ends[1]

    @property
    def device(self) -> torch.device:
        """Where the modules are."""
        return self.embeddings.weight.device

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return hidden states [B, T, H] of ids [B, T], or of their embeddings [B, T, H].

        Raises ``UsageError`` for ids that the model does not have, embeddings of another size or
        that are not finite, and positions beyond it.
        """
        if tokens.is_floating_point():
            self._check_embeddings(tokens)
        vocab, most = self._config.vocab_size, self._config.max_positions
        if not tokens.is_floating_point() and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise UsageError("A token id is not the model's.", f"Ids go from 0 to {vocab - 1}.")
        if int(positions.max()) >= most:
            raise UsageError(
                f"The text makes {int(positions.max()) + 1} tokens, but the model's context is "
                f"{most}.",
                "Shorten it.",
            )
        if not tokens.is_floating_point():
            tokens = self.embeddings(tokens)  # whole rows: what hooks on embeddings count on
        flat = tokens.flatten(0, 1).to(self.device)
        hidden = self._client.embed(flat, positions.flatten().to(self.device))
        return hidden.reshape(*tokens.shape[:2], -1)

    def _check_embeddings(self, given: Tensor) -> None:
        size = self.embeddings.weight.shape[1]
        if given.shape[-1] != size:
            raise UsageError(
                f"Embeddings of {given.shape[-1]} numbers are not this model's.",
                f"Give {size} for each token.",
            )
        if not is_finite(given):
            raise UsageError("An embedding is not finite.", "Look at what they are made of.")

    def normed(self, hidden: Tensor) -> Tensor:
        """Return what the head is given [.., H'] of what the last block gave [.., H]."""
        return self._client.normed(hidden.to(self.device, self.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [.., V] of hidden states [.., H] as the last block left them."""
        return self._client.logits(hidden.to(self.device, self.dtype))


def unfreeze(module: nn.Module) -> None:
    """Make the weights of local modules parameters, kept in float32, to be trained."""
    for one in frozen_modules(module):
        for name, buffer in list(one._buffers.items()):
            assert buffer is not None
            delattr(one, name)
            one.register_parameter(name, nn.Parameter(buffer.float()))


def freeze(module: nn.Module) -> None:
    """Make the weights of local modules buffers again, as they are."""
    for one in frozen_modules(module):
        for name, parameter in list(one._parameters.items()):
            assert parameter is not None
            delattr(one, name)
            one.register_buffer(name, parameter.detach())


def frozen_modules(module: nn.Module) -> list[FrozenModule]:
    """The local modules in it. Raises ``UsageError`` where there are none."""
    found = [one for one in module.modules() if isinstance(one, FrozenModule)]
    if not found:
        raise UsageError(
            "There are no local weights in this module.",
            "Embeddings, final norm and head are local; blocks stay frozen where they are.",
        )
    return found
