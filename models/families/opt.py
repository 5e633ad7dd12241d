"""OPT: learned positions, biases everywhere, layer norms before each sublayer or (350M) after it.

Source: arXiv 2205.01068; its variants (Galactica) leave out biases or the norms' weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from petalnode.errors import LocalProtocolError
from petalnode.models.config import (
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    ConfigReader,
    ModelConfig,
    common_fields,
)
from petalnode.models.families.family import HEAD, Family
from petalnode.models.layers.attention import Attention, projections
from petalnode.models.layers.mlp import Mlp
from petalnode.models.layers.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from petalnode.models.layers.parts import Layer
    from petalnode.models.layers.ragged import RaggedBatch

ROOT = "model.decoder."
POSITION_OFFSET = 2
"""Rows at the front of the table of positions that stand for padding."""
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class OptConfig(ModelConfig):
    """An OPT. `embed_size`: numbers of a token's embedding, which may be less than hidden_size."""

    intermediate_size: int
    embed_size: int
    activation: str
    norm_first: bool
    final_norm: bool
    affine: bool
    bias: bool


def read_opt(read: ConfigReader) -> OptConfig:
    """Return the configuration of an OPT checkpoint; its context is its table of positions."""
    kv_heads = "num_attention_heads"
    common = common_fields(read, "opt", kv_heads=kv_heads, whole_heads=True, tied=True)
    norm_first = read.flag("do_layer_norm_before", True)
    return OptConfig(
        **common,
        intermediate_size=read.size("ffn_dim", MAX_INTERMEDIATE_SIZE),
        embed_size=read.size("word_embed_proj_dim", MAX_HIDDEN_SIZE, common["hidden_size"]),
        activation=read.activation("activation_function", "relu"),
        norm_first=norm_first,
        final_norm=norm_first and not read.flag("_remove_final_layer_norm"),
        affine=read.flag("layer_norm_elementwise_affine", True),
        bias=read.flag("enable_bias", True),
    )


class OptBlock:
    """Attention, then feed-forward. T tokens, H hidden size."""

    def __init__(self, parts: Parts, config: OptConfig, index: int) -> None:
        qkv, out = projections(parts, config, bias=config.bias, out="self_attn.out_proj")
        self._attention = Attention(config, index, qkv, out)
        self._attention_norm = _norm(parts, config, "self_attn_layer_norm")
        self._feed_forward = Mlp(
            parts,
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.bias,
            up="fc1",
            down="fc2",
        )
        self._feed_forward_norm = _norm(parts, config, "final_layer_norm")
        self._norm_first = config.norm_first

    def forward(self, x_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """Return the block's output [T, H]; every row's cache is extended, not advanced."""
        if self._norm_first:
            x_TH = x_TH + self._attention(self._attention_norm(x_TH), batch)
            return x_TH + self._feed_forward(self._feed_forward_norm(x_TH))
        x_TH = self._attention_norm(x_TH + self._attention(x_TH, batch))
        return self._feed_forward_norm(x_TH + self._feed_forward(x_TH))


class OptClient:
    """Embeddings of tokens and positions, final norm, head; both ends may be projected."""

    def __init__(self, parts: Parts, config: OptConfig) -> None:
        vocab, hidden, small = config.vocab_size, config.hidden_size, config.embed_size
        rows = config.max_positions + POSITION_OFFSET
        self._max_positions = config.max_positions
        self._table = parts.vocabulary(f"{ROOT}embed_tokens.weight", vocab, small)
        self._positions = parts.vocabulary(f"{ROOT}embed_positions.weight", rows, hidden)
        tied = config.tie_embeddings
        self._head = self._table if tied else parts.vocabulary(HEAD, vocab, small)
        self._norm = _norm(parts, config, f"{ROOT}final_layer_norm") if config.final_norm else None
        self._into = self._out_of = None
        if small != hidden:
            self._into = parts.linear(f"{ROOT}project_in", hidden, small, dense=True)
            self._out_of = parts.linear(f"{ROOT}project_out", small, hidden, dense=True)

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """See `Client.embed`. Raises `LocalProtocolError` for a position beyond the table."""
        if len(positions_T) and int(positions_T.max()) >= self._max_positions:
            raise LocalProtocolError(f"This model has only {self._max_positions} positions.")
        x_TH = self._table.lookup(ids_T)
        if self._into is not None:
            x_TH = self._into(x_TH)
        return x_TH + self._positions.lookup(positions_T + POSITION_OFFSET)

    def normed(self, x_TH: Tensor) -> Tensor:
        """See `Client.normed`; projected to the size of the head."""
        if self._norm is not None:
            x_TH = self._norm(x_TH)
        return x_TH if self._out_of is None else self._out_of(x_TH)

    def logits(self, x_TH: Tensor) -> Tensor:
        """See `Client.logits`."""
        return self._head.project(self.normed(x_TH))


def _norm(parts: Parts, config: OptConfig, name: str) -> Layer:
    return parts.layer_norm(name, config.hidden_size, NORM_EPS, affine=config.affine)


OPT = Family(
    "opt",
    read_opt,
    OptBlock,
    OptClient,
    blocks=ROOT + "layers.{}.",
    roots=(ROOT, "decoder."),
    ignored=("decoder.version",),
    plain_embeddings=False,
)
