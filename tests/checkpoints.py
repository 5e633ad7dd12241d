"""Tiny random checkpoints in Hugging Face format, written by transformers, for all tests.

Use the session fixture `tiny_checkpoint`: a function of overrides of `TINY`, a Llama, or of a
family and its own configuration. It returns a directory with config.json, model.safetensors and
tokenizer.json. The weights are drawn so that the model's choices depend on every part of it: norms
and biases are random too, logits well apart.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

TINY: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MakeCheckpoint = Callable[..., Path]


def make_tiny(
    path: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint; the same seed gives the same bytes.

    A Llama is `TINY` with `overrides`; of another family they are the whole configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(TINY if family == "llama" else {}) | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            _randomize(name, weight)
        embeddings = model.get_input_embeddings()
        embeddings.weight.data /= getattr(embeddings, "scalar_embed_scale", 1.0)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(options | {"eos_token": "</s>"}))
    return path


@torch.no_grad()
def _randomize(name: str, weight: torch.Tensor) -> None:
    if weight.ndim == 1:  # norms begin at one or, Gemma's, at zero; biases at zero
        weight.copy_(weight.round() + 0.2 * torch.randn_like(weight))
    elif "embed" in name:
        weight.normal_(0.0, 0.4)
    else:
        weight.normal_(0.0, 2.0 / weight.shape[-1] ** 0.5)
    if name.endswith(("fc2.weight", "dense_4h_to_h.weight")):
        # Behind an activation without a gate, all tokens have much in common: it shall not count.
        weight.sub_(weight.mean(-1, keepdim=True))


@cache
def tiny_tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level BPE of at most 384 pieces that begins every text with <s> (id 0)."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or "", "the quick brown fox " * 20], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function of `make_tiny`'s keywords; equal keywords give one directory."""
    made: dict[str, Path] = {}

    def make(**keywords: Any) -> Path:
        key = json.dumps(keywords, sort_keys=True)
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp("tiny"), **keywords)
        return made[key]

    return make
