"""Which tensors a checkpoint of each family must hold, by name and shape. No torch.

Names are those of Hugging Face checkpoints. A block's tensors are named without the block's prefix;
`block_prefix` gives that.
"""

from petalnode.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
"""Endings of names that old exporters wrote although they are computed, not learned."""


def block_prefix(index: int) -> str:
    """Return what the names of block `index` begin with."""
    return f"model.layers.{index}."


def block_shapes(config: ModelConfig) -> Shapes:
    """Return name and shape of every tensor of one Llama block."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    attention = {"q": (queries, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    attention["o"] = (hidden, queries)
    mlp = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for part, projections, bias in (
        ("self_attn", attention, config.attention_bias),
        ("mlp", mlp, config.mlp_bias),
    ):
        for name, shape in projections.items():
            shapes[f"{part}.{name}_proj.weight"] = shape
            if bias:
                shapes[f"{part}.{name}_proj.bias"] = shape[:1]
    return shapes


def client_shapes(config: ModelConfig) -> Shapes:
    """Return name and shape of what the client holds: embeddings, final norm, head."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {EMBED: table, NORM: (config.hidden_size,)}
    if not config.tie_embeddings:
        shapes[HEAD] = table
    return shapes


def expected_shapes(config: ModelConfig) -> Shapes:
    """Return name and shape of every tensor of the whole model."""
    shapes = client_shapes(config)
    block = block_shapes(config)
    for index in range(config.num_blocks):
        prefix = block_prefix(index)
        shapes |= {prefix + name: shape for name, shape in block.items()}
    return shapes


def is_ignored(config: ModelConfig, name: str) -> bool:
    """Return whether a tensor that `expected_shapes` lacks is known to carry nothing."""
    return name.endswith(IGNORED_SUFFIXES) or (config.tie_embeddings and name == HEAD)
