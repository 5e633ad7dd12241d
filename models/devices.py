"""Which device and dtype to use, and how much memory is free there."""

from __future__ import annotations

import os

import torch

from petalnode.errors import UsageError
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
    """Memory that can be allocated on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
