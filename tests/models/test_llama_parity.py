"""The Llama blocks against transformers, float32: logits within 1e-4, greedy tokens equal."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnode.models.layers.linear import FEW_ROWS, linear

from ..checkpoints import MakeCheckpoint
from .reference import Local, load_reference, reference_generate, reference_logits

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "odd head_dim": {
        "hidden_size": 66,
        "head_dim": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": True,
    },
    "odd sizes": {
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "num_hidden_layers": 3,
        "vocab_size": 301,
        "rms_norm_eps": 1e-3,
    },
}


def prompt(length: int, vocab: int = 301, seed: int = 5) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


@pytest.fixture(scope="module", params=list(SHAPES), ids=list(SHAPES))
def model(request: pytest.FixtureRequest, tiny_checkpoint: MakeCheckpoint) -> tuple[Path, Any]:
    path = tiny_checkpoint(**SHAPES[request.param])
    return path, load_reference(path)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float(theirs.std()) > 0.5, "logits that hardly differ show nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


def test_whole_prompt(model: tuple[Path, Any]) -> None:
    path, reference = model
    ids = prompt(150)
    local = Local(path)
    close(local.step([local.row()], [ids]), reference_logits(reference, ids))


def test_split_at_every_block(model: tuple[Path, Any]) -> None:
    path, reference = model
    ids = prompt(9)
    local = Local(path, cuts=range(1, reference.config.num_hidden_layers))
    close(local.step([local.row()], [ids]), reference_logits(reference, ids))


def test_step_by_step_equals_prefill(model: tuple[Path, Any]) -> None:
    path, reference = model
    ids = prompt(70)
    local = Local(path)
    row = local.row()
    steps = torch.cat([local.step([row], [[one]]) for one in ids])
    close(steps, reference_logits(reference, ids))


def test_chunked_prefill(model: tuple[Path, Any]) -> None:
    path, reference = model
    ids = prompt(131)
    local = Local(path)
    row = local.row()
    chunks = [ids[:1], ids[1:64], ids[64:65], ids[65:]]
    close(torch.cat([local.step([row], [c]) for c in chunks]), reference_logits(reference, ids))


def test_ragged_batch(model: tuple[Path, Any]) -> None:
    """Rows at unequal lengths: a prefill, two decodes and a later chunk in one batch."""
    path, reference = model
    local = Local(path)
    texts = [prompt(30, seed=1), prompt(12, seed=2), prompt(81, seed=3), prompt(50, seed=4)]
    held = [0, 11, 80, 20]
    rows = [local.row() for _ in texts]
    for row, text, count in zip(rows, texts, held, strict=True):
        if count:
            local.step([row], [text[:count]])
    new = [text[count:] for text, count in zip(texts, held, strict=True)]
    logits = local.step(rows, new)
    expected = [reference_logits(reference, t)[c:] for t, c in zip(texts, held, strict=True)]
    close(logits, torch.cat(expected))


def test_truncate_and_continue(model: tuple[Path, Any]) -> None:
    path, reference = model
    ids = prompt(40)
    local = Local(path)
    row = local.row()
    local.step([row], [ids[:20] + prompt(15, seed=9)])
    for cache in row:
        cache.truncate(20)
    close(local.step([row], [ids[20:]]), reference_logits(reference, ids)[20:])


@pytest.mark.parametrize("length", [1, 7, 900])
@pytest.mark.parametrize("shape", ["plain", "llama3 rope", "odd head_dim"])
def test_greedy_tokens(tiny_checkpoint: MakeCheckpoint, shape: str, length: int) -> None:
    path = tiny_checkpoint(**SHAPES[shape])
    ids = prompt(length)
    expected = reference_generate(load_reference(path), ids, 200)
    assert len(set(expected)) > 20, "a text that repeats itself shows nothing"
    assert Local(path, cuts=(1,)).generate(ids, 200) == expected


@pytest.mark.parametrize("length", [1, 7, 900])
def test_greedy_tokens_of_the_demo_model(length: int) -> None:
    local = Local(Path("demo"), cuts=(3,))
    path = Path(str(resources.files("petalnode.demo")))
    ids = [0, *prompt(length - 1, 2048)]
    assert local.generate(ids, 200) == reference_generate(load_reference(path), ids, 200)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny_checkpoint: MakeCheckpoint, dtype: str) -> None:
    """Not further from float32 (relative 2-norm of the logits) than transformers in that dtype."""
    path, ids = tiny_checkpoint(), prompt(60)
    local = Local(path, dtype=dtype)
    row = local.row()
    steps = [ids[:50], ids[50:58], ids[58:59], ids[59:]]
    ours = torch.cat([local.step([row], [chunk]) for chunk in steps])
    exact = reference_logits(load_reference(path), ids)
    theirs = reference_logits(load_reference(path, dtype), ids)
    assert ours.dtype == torch.float32
    assert float((ours - exact).norm()) < 1.25 * float((theirs - exact).norm())


def test_many_rows_through_large_weights() -> None:
    """The turned product of `linear`, with and without a bias."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn((1024, 1024), generator=generator), torch.randn(1024)
    x = torch.randn((max(FEW_ROWS), 1024), generator=generator)
    for rows in (1, min(FEW_ROWS), max(FEW_ROWS)):
        for b in (None, bias):
            expected = torch.nn.functional.linear(x[:rows], weight, b)
            torch.testing.assert_close(linear(x[:rows], weight, b), expected, atol=2e-4, rtol=0)
