"""Plain local models with bitsandbytes' own layers: what quantized spans are compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .reference import load_reference


def bnb_layer(weight: Tensor, bias: Tensor | None, quant: str) -> Any:
    """Return bitsandbytes' layer of a dense weight [out, in], quantized by bitsandbytes itself."""
    import bitsandbytes as bnb

    outputs, inputs = weight.shape
    has_bias, weight = bias is not None, weight.detach().clone()
    layer: Any
    if quant == "int8":
        layer = bnb.nn.Linear8bitLt(
            inputs, outputs, bias=has_bias, has_fp16_weights=False, threshold=6.0
        )
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.LinearNF4(inputs, outputs, has_bias, weight.dtype, compress_statistics=False)
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type="nf4", blocksize=64
        )
        # Where the CPU has AVX512-BF16, this would round activations to bfloat16.
        layer.support_avx512bf16_for_cpu = False
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.to("cpu").eval()


def load_quantized(path: Path, quant: str, dtype: str = "float32") -> Any:
    """Return transformers' model, the blocks' linear layers replaced but the head not."""
    model = load_reference(path, dtype)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, bnb_layer(child.weight, child.bias, quant))
    return model


@torch.inference_mode()
def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative 2-norm of the difference."""
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
def regret(model: Any, ids: Sequence[int], chosen: Sequence[int]) -> float:
    """Return by how much a chosen token's logit missed the best one at most, step by step."""
    cache, feed, worst = None, list(ids), 0.0
    for token in chosen:
        out = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        worst, feed = max(worst, float(logits.max() - logits[token])), [token]
    return worst
