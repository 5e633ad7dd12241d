"""Weights read from a checkpoint into a span or a client's part.

Tensor by tensor through a memory map that is closed after each block, so that the peak is the
span's own size plus one block as the file has it. Matrices are quantized while they are read.
Not in inference mode: autograd refuses to save tensors of that mode, and training passes by them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from petalnode.errors import UsageError
from petalnode.models import layout
from petalnode.models.checkpoint import Checkpoint
from petalnode.models.client import ClientParts
from petalnode.models.config import DTYPES
from petalnode.models.families import family_of
from petalnode.models.layers.weights import TorchParts
from petalnode.models.quantize import check_quant
from petalnode.models.sources import Fetching
from petalnode.models.span import LoadedBlock, Span

Progress = Callable[[int, int], None]


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the torch dtype of one of the names in `DTYPES`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}.", f"Choose one of {', '.join(DTYPES)}.")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_block_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    quant: str = "none",
    keep: Span | None = None,
    progress: Progress | None = None,
    fetching: Fetching | None = None,
) -> Span:
    """Read the blocks [start, end), block by block; those that `keep` holds are taken from there.

    `quant` is one of `petalnode.models.memory.QUANTS`, `dtype` that of the rest and of activations.
    `keep` must be a span of the same checkpoint and quantization. `progress` is called with (blocks
    done, blocks in all), first with 0; before that, `fetching` hears of the download. Raises
    `UsageError` for a range outside the model, more blocks than the memory holds, or a quantization
    that cannot run here; `ModelError` for weights that do not fit the configuration.
    """
    config, total = checkpoint.config, end - start
    if not 0 <= start < end <= config.num_blocks:
        raise UsageError(
            f"The blocks {start}:{end} are out of range.",
            f"{checkpoint.name} has the blocks 0:{config.num_blocks}.",
        )
    which, where = as_dtype(dtype), torch.device(device)
    check_quant(quant, where)
    if keep is not None and (keep.dtype, keep.device) != (which, where):
        keep = None
    missing = [i for i in range(start, end) if keep is None or keep.loaded(i) is None]
    checkpoint.fetch(blocks=missing, report=fetching)
    blocks: list[LoadedBlock] = []
    for index in range(start, end):
        if progress is not None:
            progress(index - start, total)
        kept = keep.loaded(index) if keep is not None else None
        with _memory_errors(index, where):
            blocks.append(kept or _load_block(checkpoint, index, TorchParts(which, where, quant)))
    if progress is not None:
        progress(total, total)
    return Span(config, start, blocks, which, where)


@torch.no_grad()
def _load_block(checkpoint: Checkpoint, index: int, parts: TorchParts) -> LoadedBlock:
    block = family_of(checkpoint.config).block(parts, checkpoint.config, index)
    for name, tensor in checkpoint.block_tensors(index):
        parts.targets[name](tensor)
    return LoadedBlock(block, parts.nbytes, parts.additions, parts.storages)


@contextmanager
def _memory_errors(index: int, device: torch.device) -> Iterator[None]:
    """Turn torch's word for "out of memory" into `UsageError`; a CPU's has no type of its own."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not typed and "can't allocate memory" not in str(error):
            raise
        raise UsageError(
            f"The memory of {device} was used up when block {index} was loaded.",
            "Serve fewer blocks (--num-blocks), or take less for each (--quant nf4).",
        ) from error


@torch.no_grad()
def load_client(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    fetching: Fetching | None = None,
) -> ClientParts:
    """Read embeddings, final norm and head; embeddings and head stay in the checkpoint's dtype."""
    checkpoint.fetch(client=True, report=fetching)
    config, which = checkpoint.config, as_dtype(dtype)
    parts = TorchParts(which, torch.device(device))
    client = family_of(config).client(parts, config)
    for name, tensor in checkpoint.tensors(layout.client_layout(config)):
        parts.targets[name](tensor)
    return ClientParts(config, client, parts, which)
