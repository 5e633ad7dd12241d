"""What weights take in memory, known before any is read. No torch.

`models.quantize` keeps matrices in the forms that are counted here.
"""

from petalnode.models.config import ModelConfig
from petalnode.models.layers.parts import TensorSpec
from petalnode.models.layout import block_layout

QUANTS = ("none", "int8", "nf4")
NF4_GROUP = 64
"""Numbers of a row that share a scale, of 4 bytes."""


def is_quantized(inputs: int, quant: str) -> bool:
    """Return whether a matrix with rows of `inputs` numbers is quantized, or stays as it is.

    Groups of NF4 shall not span two rows: else a matrix that is part of a larger layer would have
    other groups than alone, and so other values.
    """
    return quant == "int8" or (quant == "nf4" and inputs % NF4_GROUP == 0)


def tensor_bytes(spec: TensorSpec, dtype_bytes: int, quant: str) -> int:
    """Return the bytes of a loaded tensor; `dtype_bytes` of a number that is not quantized."""
    inputs = spec.inputs or spec.shape[-1]
    if not spec.in_linear or not is_quantized(inputs, quant):
        return spec.numel * dtype_bytes
    if quant == "int8":
        return spec.numel + 4 * (spec.numel // inputs)
    return spec.numel // 2 + 4 * (spec.numel // NF4_GROUP)


def left_dense(config: ModelConfig, index: int, quant: str) -> tuple[str, ...]:
    """Return the names of the matrices of a block that `quant` cannot be applied to."""
    matrices = {n: spec for n, spec in block_layout(config, index).items() if spec.in_linear}
    return tuple(
        name
        for name, spec in matrices.items()
        if quant != "none" and not is_quantized(spec.inputs or spec.shape[-1], quant)
    )


def block_bytes(config: ModelConfig, index: int, dtype_bytes: int, quant: str = "none") -> int:
    """Return the bytes of the loaded block `index`."""
    specs = block_layout(config, index).values()
    return sum(tensor_bytes(spec, dtype_bytes, quant) for spec in specs)


def readable_bytes(count: int) -> str:
    """Return a size as people read it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.1f} KiB"
