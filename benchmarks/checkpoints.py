"""The models that are measured: random Llamas in Hugging Face format, made once by transformers.

    python -m benchmarks.checkpoints NAME FOLDER

They lie under $XDG_CACHE_HOME/petalnode/bench. No text ends early: they have no end-of-sequence id.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT

COMMON = {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 2048},
    "246M": {"num_hidden_layers": 16, "hidden_size": 1024, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "intermediate_size": 2816, "vocab_size": 32000},
}
TOKENIZER_PIECES = 2048
WEIGHT_SPREAD = 1.4
"""Times 1/sqrt(inputs): greedy choices depend on every block and do not repeat one token."""


def checkpoint(name: str) -> Path:
    """The directory of a checkpoint, made if it is not there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "petalnode" / "bench" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        verb = [sys.executable, "-m", "benchmarks.checkpoints", name, str(folder)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(verb, cwd=ROOT, check=True, **quiet)
    return folder


def make(name: str, folder: Path) -> None:
    """Write a checkpoint; it appears under its name when it is whole."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **SHAPES[name]))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, WEIGHT_SPREAD / weight.shape[1] ** 0.5)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        whole = Path(unfinished) / name
        model.save_pretrained(whole)
        write_tokenizer(whole)
        whole.rename(folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE made from this package's own source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_PIECES,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = [path.read_text() for path in sorted(Path(ROOT, "node").rglob("*.py"))]
    tokenizer.train_from_iterator(source, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
