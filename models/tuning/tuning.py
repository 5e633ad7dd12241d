"""What a client adds to frozen blocks, as data: low-rank matrices (LoRA) and deep prompts.

A **site** is a linear layer of a block that can be adapted, named as in the checkpoint without the
block's prefix: `self_attn.q_proj`. Suffixes name shapes: R rank, I inputs, O outputs, P prompt
tokens, H hidden size. Sources: LoRA (arXiv 2106.09685); deep prompts (P-tuning v2, arXiv
2110.07602), here added to hidden states as Petals does (arXiv 2312.08361).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """y [.., O] += scale * (x [.., I] @ a [R, I].T) @ b [O, R].T for the layer of one site."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class BlockTuning:
    """What is added to one block: `lora` by site; `prompt` [P, H] to the block's input.

    The prompt is added to the hidden states of the positions [0, P) of each row.
    """

    lora: Mapping[str, LowRank] = field(default_factory=dict)
    prompt: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockTuning:
        """Return the same with every tensor changed."""
        lora = {site: LowRank(change(p.a), change(p.b), p.scale) for site, p in self.lora.items()}
        return BlockTuning(lora, None if self.prompt is None else change(self.prompt))


@dataclass(frozen=True, eq=False)
class Tuning:
    """What is added to some blocks, by the block's index in the model."""

    blocks: Mapping[int, BlockTuning] = field(default_factory=dict)

    def within(self, start: int, end: int) -> Tuning:
        """Return the part for the blocks [start, end)."""
        return Tuning({i: block for i, block in self.blocks.items() if start <= i < end})

    def map(self, change: Callable[[Tensor], Tensor]) -> Tuning:
        """Return the same with every tensor changed."""
        return Tuning({index: block.map(change) for index, block in self.blocks.items()})

    def to(self, dtype: torch.dtype, device: torch.device) -> Tuning:
        """Return the same in another dtype, on another device."""
        return self.map(lambda tensor: tensor.to(device, dtype))

    def leaves(self, device: torch.device) -> Tuning:
        """Return float32 tensors to take gradients of: views of these where they are that."""
        return self.map(lambda tensor: tensor.detach().to(device, torch.float32).requires_grad_())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.named())

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor under its name: `3.self_attn.q_proj.a`, `….b`, `3.prompt`.

        Gradients come under the same names.
        """
        for index in sorted(self.blocks):
            block = self.blocks[index]
            for site in sorted(block.lora):
                yield f"{index}.{site}.a", block.lora[site].a
                yield f"{index}.{site}.b", block.lora[site].b
            if block.prompt is not None:
                yield f"{index}.prompt", block.prompt


NOTHING = Tuning()
