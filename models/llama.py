"""The Llama block: pre-norm attention with rotary embeddings, then a gated feed-forward.

Llama 1 to 3.x: grouped-query attention, scaled rotary embeddings, optional biases. Query, key and
value projections are one matrix here, gate and up another: fewer and larger products. No embeddings
and no head: those belong to the client (`petalnode.models.client`).

Suffixes name shapes: T tokens of the ragged batch, H hidden size, D heads times head size, F the
feed-forward's width. Every weight is [out, in].
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.models.attention import RaggedBatch
from petalnode.models.config import ModelConfig
from petalnode.models.linear import linear
from petalnode.models.rope import rotate_

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


class LlamaBlock:
    """One block with uninitialised weights; `fill` gives it those of a checkpoint."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.index = config, index
        hidden, wide = config.hidden_size, config.intermediate_size
        queries = config.num_heads * config.head_dim
        both = queries + 2 * config.num_kv_heads * config.head_dim

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def bias(size: int, present: bool) -> Tensor | None:
            return empty(size) if present else None

        self.attention_norm_H = empty(hidden)
        self.qkv_DH = empty(both, hidden)
        self.qkv_bias_D = bias(both, config.attention_bias)
        self.out_HD = empty(hidden, queries)
        self.out_bias_H = bias(hidden, config.attention_bias)
        self.mlp_norm_H = empty(hidden)
        self.gate_up_FH = empty(2 * wide, hidden)
        self.gate_up_bias_F = bias(2 * wide, config.mlp_bias)
        self.down_HF = empty(hidden, wide)
        self.down_bias_H = bias(hidden, config.mlp_bias)

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the block's output [T, H]; every row's cache is extended, not advanced."""
        config = self.config
        h_TH = F.rms_norm(x_TH, (config.hidden_size,), self.attention_norm_H, config.norm_eps)
        qkv_TD = linear(h_TH, self.qkv_DH, self.qkv_bias_D)
        heads = qkv_TD.view(len(x_TH), -1, config.head_dim)
        rotate_(heads[:, : -config.num_kv_heads], batch.cos, batch.sin)
        mixed_TD = batch.attend(self.index, heads, config.num_kv_heads)
        x_TH = x_TH + linear(mixed_TD, self.out_HD, self.out_bias_H)
        h_TH = F.rms_norm(x_TH, (config.hidden_size,), self.mlp_norm_H, config.norm_eps)
        gate_TF, up_TF = linear(h_TH, self.gate_up_FH, self.gate_up_bias_F).chunk(2, -1)
        return x_TH + linear(F.silu(gate_TF).mul_(up_TF), self.down_HF, self.down_bias_H)

    def targets(self) -> Iterable[tuple[str, Tensor]]:
        """Yield each of the checkpoint's names for this block with the memory it belongs in."""
        config = self.config
        kv = config.num_kv_heads * config.head_dim
        split = (config.num_heads * config.head_dim, kv, kv)
        half = (config.intermediate_size, config.intermediate_size)
        yield "input_layernorm.weight", self.attention_norm_H
        yield "post_attention_layernorm.weight", self.mlp_norm_H
        yield from _parts(QKV, self.qkv_DH, self.qkv_bias_D, split)
        yield from _parts(("self_attn.o_proj",), self.out_HD, self.out_bias_H)
        yield from _parts(GATE_UP, self.gate_up_FH, self.gate_up_bias_F, half)
        yield from _parts(("mlp.down_proj",), self.down_HF, self.down_bias_H)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(target.numel() * target.element_size() for _, target in self.targets())


def _parts(
    names: tuple[str, ...], weight: Tensor, bias: Tensor | None, split: tuple[int, ...] = ()
) -> Iterable[tuple[str, Tensor]]:
    """Yield the slices of a (fused) linear layer that the named layers of a checkpoint fill."""
    sizes = list(split) or [len(weight)]
    for name, part in zip(names, torch.split(weight, sizes), strict=True):
        yield f"{name}.weight", part
    if bias is not None:
        for name, part in zip(names, torch.split(bias, sizes), strict=True):
            yield f"{name}.bias", part
