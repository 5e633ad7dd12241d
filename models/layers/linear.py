"""Linear layers, and the one case where the library's own product is not the fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = range(7, 49)
LARGE_WEIGHT = 1 << 20


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x [T, I] through a layer [O, I]: [T, O].

    Reading the weights is what a batch of a few decode rows costs. There, MKL takes 1.3 to 1.6
    times as long with the few rows first as with the weights first (measured on AVX-512, one
    thread, float32; not for more rows or small matrices), so the product is turned around.
    """
    turn = len(x_TI) in FEW_ROWS and weight_OI.numel() >= LARGE_WEIGHT
    if not turn or x_TI.dtype != torch.float32 or x_TI.device.type != "cpu":
        return F.linear(x_TI, weight_OI, bias_O)
    product_TO = F.linear(weight_OI, x_TI).t().contiguous()
    return product_TO if bias_O is None else product_TO.add_(bias_O)
