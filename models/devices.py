"""Which device and dtype to use, and how much memory is free there."""

from __future__ import annotations

import torch

from petalnode.errors import UsageError
from petalnode.models.host_memory import available_bytes
from petalnode.models.loading import as_dtype


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU. Raises ``UsageError``."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"There is no device {name!r}.", "Use auto, cpu, cuda, cuda:1, … or mps."
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"Device {name} is not here: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices.",
            "Use --device cpu, or install a CUDA build of torch and its driver.",
        )
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"Device {name} is not supported.", "Use cpu, cuda[:i] or mps.")
    return device


def pick_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """``auto``: float32 on a CPU, the checkpoint's own dtype on an accelerator.

    Raises ``UsageError`` for another name than a dtype's.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint_dtype
    return as_dtype(name)


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on the device now, at least 0."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":  # memory is shared with the host, up to what Metal recommends
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(int(left), available_bytes()))
    return available_bytes()
