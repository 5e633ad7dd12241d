"""Blocks that are elsewhere as a ``torch.nn.Module``, and the parameters that a client trains.

    with open_blocking(MODEL, options) as node:
        lora = LoraParameters(node.value.checkpoint.config, rank=8, targets=["q_proj", "v_proj"])
        blocks = RemoteBlocks(node, lora)
        blocks(hidden, attention_mask).square().mean().backward()   # gradients in lora's .grad

Padding never leaves the client: it is cut away before, and its outputs are zeros. The hops keep no
activations; what backward needs is the record of the forward, the inputs of the hops.
autograd holds it, and frees it as it frees the tensors of local layers. Second derivatives there
are none. B rows of T columns, H hidden size, P prompt tokens, N tokens of all rows without padding.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from petalnode.blocking import Held
from petalnode.errors import UsageError
from petalnode.events import Report, ignore
from petalnode.models.config import ModelConfig
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.sites import lora_sites
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning
from petalnode.training.inputs import check_mask, check_tensor

PROMPT = "soft"
"""Name of the prompt before the text, beside those of ``Tuning.named``."""

USUAL_TARGETS = ("q_proj", "v_proj", "query_key_value", "qkv_proj")


class Training(Protocol):
    """What ``RemoteBlocks`` needs of a session: see ``petalnode.training.session``."""

    async def forward(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        tuning: Tuning = ...,
        keep_blocks: bool = ...,
        backward: bool = ...,
    ) -> tuple[Tensor, Any]:
        """Outputs [N, H] of rows one after the other, and the record that backward needs, where
        one follows."""

    async def backward(self, record: Any, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients [N, H] of the inputs, and of the tuning's tensors by name."""


class TrainedParameters(nn.Module):
    """A tuning's tensors as ``nn.Parameter``s, and a prompt [P, H] before the text, if any.

    Names are those of ``Tuning.named``: ``0.self_attn.q_proj.a``; the prompt is ``soft``.
    """

    def __init__(self, tuning: Tuning = NOTHING, prompt: Tensor | None = None) -> None:
        super().__init__()
        self._first = tuning
        named = list(tuning.named()) + ([] if prompt is None else [(PROMPT, prompt)])
        for name, tensor in named:
            _place(self, name, nn.Parameter(tensor.detach().clone().float()))

    @property
    def prompt(self) -> Tensor | None:
        """What goes before the text as hidden states [P, H]."""
        found: Tensor | None = getattr(self, PROMPT, None)
        return found

    def named(self) -> dict[str, Tensor]:
        """The parameters of the tuning by name; the prompt is not one of them."""
        return {name: one for name, one in self.named_parameters() if name != PROMPT}

    def tuning(self) -> Tuning:
        """A copy of the tuning as it is now: a step of an optimizer does not change it."""
        named = self.named().items()
        copies = {name: one.detach().to("cpu", torch.float32, copy=True) for name, one in named}
        return _with_tensors(self._first, copies)


class LoraParameters(TrainedParameters):
    """Low-rank matrices for the layers of every block that ``targets`` name, as in ``peft``.

    ``targets`` are names of layers, or their endings: ``q_proj``; by default those that make
    queries and values. ``rank`` and ``alpha`` are peft's ``r`` and ``lora_alpha``. There is no
    dropout: backward computes the product once more, and would have to drop the same numbers.
    Raises ``UsageError`` for a target that no block has.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        targets = usual_targets(config) if targets is None else targets
        targets = [targets] if isinstance(targets, str) else targets
        super().__init__(new_lora(config, rank=rank, alpha=alpha, targets=targets, rng=rng))


class SoftPrompt(TrainedParameters):
    """A prompt of ``tokens`` virtual tokens before the text, as ``peft``'s prompt tuning has it.

    ``start`` [tokens, H] are its first values, such as the embeddings of a text; else it begins at
    random numbers of deviation ``scale``.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: int = 16,
        *,
        start: Tensor | None = None,
        scale: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(NOTHING, _first_prompt(config, tokens, start, scale, seed))


class DeepPrompts(TrainedParameters):
    """A prompt before the text, and in every block one more, added to its positions there.

    Those of the blocks begin at zero: what is computed at first is what a ``SoftPrompt`` gives.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: int = 16,
        *,
        start: Tensor | None = None,
        scale: float = 0.02,
        seed: int = 0,
    ) -> None:
        prompt = _first_prompt(config, tokens, start, scale, seed)
        block = BlockTuning(prompt=torch.zeros_like(prompt))
        super().__init__(Tuning(dict.fromkeys(range(config.num_blocks), block)), prompt)


class RemoteBlocks(nn.Module):
    """Blocks that other machines hold, which add ``trained`` to what they compute.

    It has no parameters of its own: whoever made ``trained`` gives them to an optimizer. The
    session for it is opened in ``node`` when it is first used, and closed when nobody refers to
    this or to its graphs; ``report`` is told, in the node's thread, what it waits for.
    """

    trained: TrainedParameters | None

    def __init__(
        self,
        node: Held[Any],
        trained: TrainedParameters | None = None,
        report: Report = ignore,
    ) -> None:
        super().__init__()
        self._node, self._report = node, report
        self._opened: _Opened | None = None
        self.add(trained)

    def add(self, trained: TrainedParameters | None) -> None:
        """Add these to what is computed from now on, or nothing."""
        object.__setattr__(self, "trained", trained)  # no child: it belongs to who made it

    @property
    def session(self) -> Held[Any]:
        """The training session, in the node's loop."""
        return self._open().held

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"{self._node.value.checkpoint.config.num_blocks} blocks on other machines, frozen"

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """Outputs [B, T, H] of the last block for ``hidden`` [B, T, H] of the first.

        ``attention_mask`` [B, T] is 0 where there is padding, on any side. ``collect`` gets the
        outputs [B, T, H] of every block, without gradients. Raises ``UsageError`` for shapes that
        do not fit, and what the session raises.
        """
        packed, index, lengths = pack(hidden, attention_mask)
        size = self._node.value.checkpoint.config.hidden_size
        if hidden.shape[2] != size:
            raise UsageError(
                f"Hidden states of shape {tuple(hidden.shape)} are not the model's.",
                f"Give them as [batch, tokens, {size}].",
            )
        named = {} if self.trained is None else self.trained.named()
        tuning = NOTHING if self.trained is None else self.trained.tuning()
        call = _Call(self._open(), lengths, tuning, list(named), collect is not None)
        if torch.is_grad_enabled() and any(o.requires_grad for o in (packed, *named.values())):
            output = _Through.apply(call, packed, *named.values())  # type: ignore[no-untyped-call]
        else:
            output = call.forward(packed, backward=False)[0]
        if collect is not None:
            collect += [unpack(one.to(packed), index, hidden) for one in call.blocks]
        return unpack(output, index, hidden)

    def _open(self) -> _Opened:
        if self._opened is None:
            opening = self._node.value.open_training(report=self._report)
            self._opened = _Opened(self._node.hold(opening))
        return self._opened


class _Opened:
    """A session that is closed when neither the blocks nor a graph refer to it any more."""

    def __init__(self, held: Held[Any]) -> None:
        self.held = held
        weakref.finalize(self, held.release)


class _Call:
    """One pass through the blocks. ``blocks`` are the outputs of each, where they are wanted."""

    def __init__(
        self,
        opened: _Opened,
        lengths: Sequence[int],
        tuning: Tuning,
        names: list[str],
        keep_blocks: bool,
    ) -> None:
        self.names, self.blocks = names, list[Tensor]()
        self._opened, self._lengths, self._tuning = opened, lengths, tuning
        self._keep_blocks = keep_blocks

    def forward(self, packed: Tensor, *, backward: bool) -> tuple[Tensor, Any]:
        session: Training = self._opened.held.value

        async def forward() -> tuple[Tensor, Any]:
            return await session.forward(
                packed.detach(),
                self._lengths,
                tuning=self._tuning,
                keep_blocks=self._keep_blocks,
                backward=backward,
            )

        output, record = self._opened.held.run(forward)
        if self._keep_blocks:
            self.blocks = record.hidden_states[1:]
        return output.to(packed), record

    def backward(self, record: Any, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        session: Training = self._opened.held.value
        return self._opened.held.run(session.backward, record, grad)


class _Through(torch.autograd.Function):
    """The chain as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, packed: Tensor, *tensors: Tensor) -> Tensor:
        output, record = call.forward(packed, backward=True)
        ctx.call = call
        ctx.like = [one.new_empty(0) for one in (packed, *tensors)]
        # autograd frees what it saved when backward is done with it; the record goes with it.
        handle = torch.empty(0)
        handle.record = record  # type: ignore[attr-defined]
        ctx.save_for_backward(handle)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UsageError(
                "Second derivatives through remote blocks are not to be had.",
                "Call backward or grad without create_graph.",
            )
        (handle,) = ctx.saved_tensors
        record = getattr(handle, "record", None)
        if record is None:
            raise UsageError(
                "Something put copies in the place of what autograd saved for remote blocks.",
                "Keep checkpointing and other saved-tensor hooks to local layers.",
            )
        gx, named = ctx.call.backward(record, grads[0])
        every = [gx, *(named[name] for name in ctx.call.names)]
        return (None, *(one.to(like) for one, like in zip(every, ctx.like, strict=True)))


def pack(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """Return the tokens [N, H] of ``hidden`` [B, T, H] that are no padding, where they were, and
    how many each row has (rows that have none are left out)."""
    check_tensor("The input", hidden)
    if hidden.ndim != 3 or not hidden.numel():
        raise UsageError(
            f"Hidden states of shape {tuple(hidden.shape)} are no rows of tokens.",
            "Give them as [batch, tokens, hidden size].",
        )
    batch, tokens, size = hidden.shape
    if mask is None:
        return hidden.reshape(batch * tokens, size), None, [tokens] * batch
    real = check_mask(mask, batch, tokens).to(hidden.device)
    if bool(real.all()):
        return pack(hidden, None)
    index = real.reshape(-1).nonzero()[:, 0]
    lengths = [length for length in real.sum(1).tolist() if length]
    if not lengths:
        raise UsageError("Every token is masked.", "Leave at least one in the attention mask.")
    return hidden.reshape(batch * tokens, size)[index], index, lengths


def unpack(packed: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Return ``packed`` [N, H] where it was in rows [B, T, H], and zeros where padding was."""
    if index is None:
        return packed.reshape(like.shape)
    rows = packed.new_zeros(like.shape[0] * like.shape[1], like.shape[2])
    return rows.index_copy(0, index, packed).reshape(like.shape)


def usual_targets(config: ModelConfig) -> list[str]:
    """The layers that are adapted where nobody says which: queries and values, as in peft."""
    sites = lora_sites(config, 0)
    return [name for name in USUAL_TARGETS if any(site.endswith(name) for site in sites)]


def _first_prompt(
    config: ModelConfig, tokens: int, start: Tensor | None, scale: float, seed: int
) -> Tensor:
    shape = (tokens, config.hidden_size)
    if start is not None:
        check_tensor("The beginning of a prompt", start)
    if start is not None and tuple(start.shape) != shape:
        raise UsageError(
            f"A prompt of shape {tuple(start.shape)} is not one of {shape}.",
            "Give one vector of hidden size for each of its tokens.",
        )
    if type(tokens) is not int or not 1 <= tokens < config.max_positions:
        raise UsageError(
            f"A prompt cannot have {tokens} tokens.",
            f"Choose from 1 to {config.max_positions - 1}; 16 is usual.",
        )
    if start is not None:
        return start.float()
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def _place(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, in modules made for it."""
    *path, last = name.split(".")
    for part in path:
        child = getattr(module, part, None)
        if child is None:
            module.add_module(part, child := nn.Module())
        module = child
    module.register_parameter(last, parameter)


def _with_tensors(shape: Tuning, tensors: dict[str, Tensor]) -> Tuning:
    """Return a tuning like ``shape`` made of other tensors."""

    def block(index: int, one: BlockTuning) -> BlockTuning:
        lora = {
            site: LowRank(tensors[f"{index}.{site}.a"], tensors[f"{index}.{site}.b"], low.scale)
            for site, low in one.lora.items()
        }
        return replace(one, lora=lora, prompt=tensors.get(f"{index}.prompt"))

    return Tuning({index: block(index, one) for index, one in shape.blocks.items()})
