"""RMS norm, and the one case where the library's own takes longer than its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension (arXiv 1910.07467), in x's dtype.

    `weight` is frozen: its gradient would need what is overwritten here.

    torch 2.13 has no kernel of its own for CPUs: each of its operations there goes into new memory.
    The same operations, for the same numbers bit for bit, take less time in less memory.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x.mul(scale).mul_(weight)
