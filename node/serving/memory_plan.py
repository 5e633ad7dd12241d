"""How many blocks the free memory holds, and why. Pure: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

from petalnode.errors import UsageError
from petalnode.events import Memory
from petalnode.models.config import ModelConfig
from petalnode.models.memory import block_bytes, left_dense, readable_bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WEIGHT_SHARE = 0.75
"""Of what loading leaves free, for weights; the rest is for attention caches and activations."""


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be allocated on `device`, and on the host; for a CPU they are the same."""

    device: str
    bytes: int
    host_bytes: int


def plan_memory(
    config: ModelConfig,
    free: FreeMemory,
    *,
    dtype: str,
    quant: str,
    wanted: int | None = None,
    adapters: int = 0,
) -> Memory:
    """Return how many blocks fit, at most all, with the reasons; `wanted` blocks are not doubted.

    Every block counts as the largest, with the `adapters` bytes that those which the node offers
    add to one at most. While a block is read, its files' pages are in memory too. Raises
    ``UsageError`` with the numbers where not even one block fits.
    """
    block = max(block_sizes(config, dtype, quant)) + adapters
    loading = max(block_sizes(config, config.dtype, "none"))
    left = free.bytes - loading
    fits = max(0, min(config.num_blocks, int(left * WEIGHT_SHARE) // block))
    if free.host_bytes < loading:
        fits = 0
    if wanted is None and fits == 0:
        raise nothing_fits(config, free, dtype, quant, loading, adapters)
    return Memory(
        device=free.device,
        dtype=dtype,
        quant=quant,
        free=free.bytes,
        loading=loading,
        kv=max(0, left - int(left * WEIGHT_SHARE)),
        block=block,
        fits=fits,
        blocks=fits if wanted is None else wanted,
        of=config.num_blocks,
        left_dense=left_dense(config, 0, quant),
        adapters=adapters,
    )


def nothing_fits(
    config: ModelConfig, free: FreeMemory, dtype: str, quant: str, loading: int, adapters: int
) -> UsageError:
    """The error, with the numbers."""
    now, nf4 = (
        readable_bytes(max(block_sizes(config, dtype, one)) + adapters) for one in (quant, "nf4")
    )
    added = f", {readable_bytes(adapters)} of that for its adapters," if adapters else ""
    form = dtype if quant == "none" else quant
    here, host = readable_bytes(free.bytes), readable_bytes(free.host_bytes)
    there = "" if here == host else f" and {host} on the host"
    return UsageError(
        f"Not even one block fits: it takes {now} in {form}{added} and {readable_bytes(loading)} "
        f"more while it is read, and {here} are free on {free.device}{there}.",
        "Free some memory, or serve this model from a larger machine."
        if quant == "nf4"
        else f"Use --quant nf4 ({nf4} a block), free some memory, or use a larger machine.",
    )


def block_sizes(config: ModelConfig, dtype: str, quant: str) -> list[int]:
    """Bytes of each block."""
    each = range(config.num_blocks)
    return [block_bytes(config, index, DTYPE_BYTES[dtype], quant) for index in each]
