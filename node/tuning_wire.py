"""A tuning on its way to a hop: the same frames for training and for generation.

    tuning(version) + the matrices of ``Tuning.named()``, cut by ``petalnode.tensor_frames``; the
                      scale of a low-rank pair goes with both of its matrices

Sizes are checked before anything is allocated, names and completeness here; what the numbers must
be like for a model is for ``models.tuning.check`` to say.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petalnode.models.tuning.tuning import BlockTuning, LowRank, Tuning
from petalnode.p2p.frames import Frame
from petalnode.protocol import MAX_BLOCKS, BadMessage
from petalnode.tensor_frames import Packed, TensorCollector, pack_tensors

MAX_BLOCK_TENSORS = 64
"""What is added to one block: two matrices for each of its sites, and a prompt."""


def pack(tuning: Tuning, max_bytes: int, version: int = 0) -> Iterator[Packed]:
    """Frames of a tuning; an empty one is a single frame. Payloads are at most ``max_bytes``."""
    scales = {
        f"{index}.{site}.{matrix}": float(pair.scale)
        for index, block in tuning.blocks.items()
        for site, pair in block.lora.items()
        for matrix in "ab"
    }
    return pack_tensors({"type": "tuning", "version": version}, tuning.named(), max_bytes, scales)


class Collector:
    """Makes a tuning for the blocks [start, end) of its frames; allocates ``limit_bytes``.

    See ``TensorCollector`` for how these are counted.
    """

    def __init__(self, start: int, end: int, limit_bytes: int) -> None:
        self._start, self._end = start, end
        self._tensors = TensorCollector(limit_bytes, (end - start) * MAX_BLOCK_TENSORS)

    @property
    def nbytes(self) -> int:
        """What the matrices that began to come take, as float32."""
        return self._tensors.nbytes

    def take(self, frame: Frame) -> Tuning | None:
        """Take the next frame: the tuning with the last one, None before.

        Raises ``TooLarge``, or ``BadMessage`` for frames that break the protocol, or are of other
        blocks.
        """
        if not self._tensors.add(frame):
            return None
        blocks: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in self._tensors.tensors.items():
            index, rest = self._parse(name)
            blocks.setdefault(index, {})[rest] = tensor
        return Tuning({index: self._block(index, named) for index, named in blocks.items()})

    def _parse(self, name: str) -> tuple[int, str]:
        number, _, rest = name.partition(".")
        if not (number.isascii() and number.isdigit() and len(number) <= len(str(MAX_BLOCKS))):
            raise BadMessage(f"{name!r} names no tensor of a tuning")
        index = int(number)
        if str(index) != number:  # else one tensor could come under several names
            raise BadMessage(f"{name!r} names no tensor of a tuning")
        if not self._start <= index < self._end:
            raise BadMessage(f"{name!r} is of none of the blocks {self._start}:{self._end}")
        return index, rest

    def _block(self, index: int, named: dict[str, torch.Tensor]) -> BlockTuning:
        prompt = named.pop("prompt", None)
        lora = {}
        for site in sorted({name.rpartition(".")[0] for name in named}):
            a, b = named.pop(f"{site}.a", None), named.pop(f"{site}.b", None)
            if a is None or b is None:
                raise BadMessage(f"{index}.{site} is not a pair of matrices")
            lora[site] = LowRank(a, b, self._tensors.scales[f"{index}.{site}.a"])
        if named:
            raise BadMessage(f"{index}.{next(iter(named))} names no tensor of a tuning")
        return BlockTuning(lora, prompt)
