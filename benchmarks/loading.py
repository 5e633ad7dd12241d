"""A large checkpoint in shards, and one process that loads a span of it and says what it took.

    python -m benchmarks.loading make FOLDER
    python -m benchmarks.loading load MODEL START END

The model is a Llama in bfloat16 of about 2 GB, which lies under $XDG_CACHE_HOME/petalnode/bench.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import ROOT

if TYPE_CHECKING:
    import torch

BLOCKS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 40, 1536, 4096, 12, 3, 32_000
SHARD_BYTES = 200_000_000
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": BLOCKS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def sharded_checkpoint() -> Path:
    """The directory of the checkpoint, made if it is not there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "petalnode" / "bench" / "2GB"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        verb = [sys.executable, "-m", "benchmarks.loading", "make", str(folder)]
        subprocess.run(verb, cwd=ROOT, check=True)
    return folder


def make(folder: Path) -> None:
    """Write the checkpoint; it appears under its name when it is whole."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        whole = Path(unfinished) / folder.name
        whole.mkdir()
        where: dict[str, str] = {}
        for number, shard in enumerate(shards(tensors())):
            name = f"model-{number:05d}.safetensors"
            save_file(shard, whole / name, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, name)
        (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (whole / "config.json").write_text(json.dumps(CONFIG))
        whole.rename(folder)


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in the order of the model; every block has the same numbers."""
    import torch

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, shape[-1] ** -0.5)

    kv = HIDDEN // HEADS * KV_HEADS
    block = {f"self_attn.{name}_proj": drawn(HIDDEN, HIDDEN) for name in "qo"}
    block |= {f"self_attn.{name}_proj": drawn(kv, HIDDEN) for name in "kv"}
    block |= {f"mlp.{name}_proj": drawn(INNER, HIDDEN) for name in ("gate", "up")}
    block |= {"mlp.down_proj": drawn(HIDDEN, INNER)}
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    block |= {"input_layernorm": ones, "post_attention_layernorm": ones}
    yield "model.embed_tokens.weight", drawn(VOCABULARY, HIDDEN)
    for index in range(BLOCKS):
        for name, tensor in block.items():
            yield f"model.layers.{index}.{name}.weight", tensor.clone()
    yield "model.norm.weight", ones
    yield "lm_head.weight", drawn(VOCABULARY, HIDDEN)


def shards(named: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Cut the tensors into files of about `SHARD_BYTES`, wherever that is."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named:
        if size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def load(model: str, start: int, end: int) -> dict[str, float]:
    """Load a span and return bytes and seconds: the peak is that of this process while it loads."""
    from petalnode.models.checkpoint import open_checkpoint
    from petalnode.models.loading import load_block_span

    checkpoint = open_checkpoint(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    base = status_bytes("VmRSS")
    began = time.monotonic()
    span = load_block_span(checkpoint, start, end, dtype="bfloat16")
    return {
        "base": base,
        "peak": status_bytes("VmHWM") - base,
        "span": span.param_bytes,
        "s": time.monotonic() - began,
    }


def status_bytes(key: str) -> int:
    """A figure of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(key + ":")[2].split()[0]) * 1024


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        print(json.dumps(load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))), flush=True)
