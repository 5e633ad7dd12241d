"""Named matrices as frames: many of them, or large ones, cut into frames of bounded size.

Each frame carries the message's own header beside

    parts   for each of its tensors [name, rows, first, scale]: these are the rows from ``first`` on
            of a matrix of so many; ``scale`` goes with the matrix, 1.0 where nothing does
    last    whether the message ends here

Rows of one matrix come in order and without another's between them; frames of one message come
without those of another between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from petalnode.errors import LocalProtocolError
from petalnode.p2p.frames import ALIGN, MAX_TENSORS, Frame
from petalnode.protocol import BadMessage, text, whole

MAX_MATRIX_ROWS = 1 << 24

Packed = tuple[dict[str, Any], list[torch.Tensor]]
"""Header and tensors of a frame."""


def pack_tensors(
    header: Mapping[str, Any],
    named: Iterable[tuple[str, torch.Tensor]],
    max_bytes: int,
    scales: Mapping[str, float] | None = None,
) -> Iterator[Packed]:
    """Frames of ``header`` and matrices [rows, columns], none with a payload over ``max_bytes``.

    Raises ``LocalProtocolError`` if one row alone is larger.
    """
    parts: list[list[Any]] = []
    tensors: list[torch.Tensor] = []
    size = 0
    for name, tensor in named:
        matrix, first = tensor.detach().cpu(), 0
        row_bytes = matrix.nbytes // len(matrix)
        while first < len(matrix):
            fitting = (max_bytes - size) // row_bytes
            if tensors and (fitting < 1 or len(tensors) == MAX_TENSORS):
                yield {**header, "parts": parts, "last": False}, tensors
                parts, tensors, size = [], [], 0
                continue
            if fitting < 1:
                raise LocalProtocolError(f"A row of {row_bytes} bytes does not fit a frame.")
            piece = matrix[first : first + fitting]
            parts.append([name, len(matrix), first, (scales or {}).get(name, 1.0)])
            tensors.append(piece)
            size += piece.nbytes + ALIGN
            first += len(piece)
    yield {**header, "parts": parts, "last": True}, tensors


class TooLarge(BadMessage):
    """More than ``limit_bytes`` would come."""


class TensorCollector:
    """Puts the matrices of one message together again; allocates ``limit_bytes`` at most.

    A matrix counts as soon as its first rows come, as float32 if its numbers are shorter: that is
    what is kept of it in the end. ``nbytes`` is how many there are.
    """

    def __init__(self, limit_bytes: int, max_tensors: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.scales: dict[str, float] = {}
        self.nbytes = 0
        self._limit_bytes, self._max_tensors = limit_bytes, max_tensors
        self._open: tuple[str, int] | None = None

    def add(self, frame: Frame) -> bool:
        """Take the next frame; whether it was the last. Raises ``BadMessage``, ``TooLarge``."""
        parts = frame.header.get("parts")
        if not isinstance(parts, list) or len(parts) != len(frame.tensors):
            raise BadMessage("the parts of a message are not one for each tensor")
        for entry, tensor in zip(parts, frame.tensors, strict=True):
            self._add_part(entry, tensor)
        if frame.header.get("last") is not True:
            if not parts:
                raise BadMessage("a frame without anything in it that is not the last")
            return False
        if self._open is not None:
            raise BadMessage(f"{self._open[0]} is not complete")
        return True

    def _add_part(self, entry: object, tensor: torch.Tensor) -> None:
        if not isinstance(entry, list) or len(entry) != 4:
            raise BadMessage("a part is not name, rows, first, scale")
        name, rows = text(entry[0]), whole(entry[1], 1, MAX_MATRIX_ROWS)
        if not name.isprintable():  # sentences name it
            raise BadMessage("the name of a tensor cannot be printed")
        first = whole(entry[2], 0, rows - 1)
        if tensor.dim() != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise BadMessage(f"{name} is no matrix of floating point numbers")
        if first + len(tensor) > rows:
            raise BadMessage(f"{name} has more rows than it should")
        if self._open is None:
            self._begin(name, rows, first, tensor, entry[3])
        else:
            self._continue(name, first, tensor)
        end = first + len(tensor)
        self._open = (name, end) if end < rows else None

    def _begin(self, name: str, rows: int, first: int, tensor: torch.Tensor, scale: object) -> None:
        if first or name in self.tensors:
            raise BadMessage(f"a part of {name} that nothing came before")
        if len(self.tensors) >= self._max_tensors:
            raise BadMessage(f"more than {self._max_tensors} tensors")
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise BadMessage(f"the scale of {name} is no finite number")
        self.nbytes += rows * tensor.shape[1] * max(tensor.itemsize, torch.float32.itemsize)
        if self.nbytes > self._limit_bytes:
            raise TooLarge(f"{name} is larger than it may be")
        self.scales[name] = scale
        if rows == len(tensor):
            self.tensors[name] = tensor
        else:
            self.tensors[name] = tensor.new_empty(rows, tensor.shape[1])
            self.tensors[name][: len(tensor)] = tensor

    def _continue(self, name: str, first: int, tensor: torch.Tensor) -> None:
        if (name, first) != self._open:
            raise BadMessage(f"a part of {name} that does not follow what came before")
        matrix = self.tensors[name]
        if tensor.shape[1] != matrix.shape[1] or tensor.dtype != matrix.dtype:
            raise BadMessage(f"the parts of {name} do not fit together")
        matrix[first : first + len(tensor)] = tensor
