"""The header of a safetensors file, checked against the file's size. No torch.

Format: 8 bytes length (little-endian), that many bytes of JSON, the tensors' bytes without gaps:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from petalnode.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E8M0": 1}
DTYPE_BYTES |= {"U64": 8, "U32": 4, "U16": 2}
FLOATS = ("F32", "F16", "BF16")
"""The dtypes that unquantized weights come in."""
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors' dtype name, shape, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the file holds by name. Raises `ModelError` when the file is not all there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise ModelError(
                    f"{path} is a Git LFS pointer, not the weights.", "Run `git lfs pull` there."
                )
            length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
            if size < 8 or length > size - 8:
                raise damaged(path, f"it has {size} bytes and ends inside its own header")
            if length > MAX_HEADER_BYTES:
                raise damaged(path, f"its header claims {length} bytes")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    return _parse(path, raw, size - 8 - length)


def damaged(path: Path, why: str) -> ModelError:
    """Return the error for a file that is not all there; `why` is half a sentence."""
    return ModelError(f"{path} is damaged or truncated: {why}.", "Download or copy the file again.")


def _parse(path: Path, raw: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not an object")
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    promised = 0
    for name, entry in header.items():
        infos[name], end = _entry(path, name, entry)
        promised = max(promised, end)
    if promised != data_bytes or sum(info.nbytes for info in infos.values()) != promised:
        raise damaged(
            path, f"it holds {data_bytes} bytes of tensors where its header promises {promised}"
        )
    return infos


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int]:
    """Return one tensor and the offset where it ends."""
    bad = damaged(path, f"its header describes the tensor {name[:100]!r} wrongly")
    if not isinstance(entry, dict):
        raise bad
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPE_BYTES
        or not _counts(shape)
        or not _counts(offsets)
        or len(offsets) != 2
    ):
        raise bad
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise bad
    return TensorInfo(dtype, tuple(shape), nbytes), offsets[1]


def _counts(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(one) is int and 0 <= one < 1 << 48 for one in value)
    )
