"""Linear layers, and the one case where the library's own product is not the fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = range(7, 49)
LARGE_WEIGHT = 1 << 20


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x [T, I] through a layer [O, I]: [T, O].

    Reading the weights is what a batch of some decode rows costs. For those, MKL takes 1.3 to 1.6
    times as long when the few rows come first as when the weights do (measured on AVX-512, one
    thread, float32; no difference for more rows or small matrices), so the product is turned around.
    """
    if len(x_TI) in FEW_ROWS and weight_OI.numel() >= LARGE_WEIGHT:  # noqa: SIM102 (two reasons)
        if x_TI.dtype == torch.float32 and x_TI.device.type == "cpu":
            product_TO = F.linear(weight_OI, x_TI).t().contiguous()
            return product_TO if bias_O is None else product_TO.add_(bias_O)
    return F.linear(x_TI, weight_OI, bias_O)
