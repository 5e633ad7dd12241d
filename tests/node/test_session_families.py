"""Families whose client's part or context differs from a Llama's, through a chain of two hops."""

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.session.session import GenerateOptions

from ..models.parity import prompt
from ..models.reference import load_reference, reference_generate
from ..models.shapes import SHAPES
from .memory_swarm import open_memory_swarm

SPANS = [("a", 0, 1), ("b", 1, 3)]
CASES = [
    ("bloom", "eleven heads, not a power of two"),
    ("opt", "350M: norms last, projected embeddings"),
    ("falcon", "RW: sequential, biases, ALiBi"),
]


@pytest.mark.parametrize(("family", "shape"), CASES)
async def test_tokens_equal_those_of_transformers(tiny_checkpoint, family, shape):
    path = tiny_checkpoint(family=family, **SHAPES[family][shape])
    ids = prompt(9, 301)
    expected = reference_generate(load_reference(path), ids, 24)
    async with open_memory_swarm(path, SPANS) as swarm, swarm.session(*SPANS) as session:
        generation = session.generate(ids, GenerateOptions(max_new_tokens=24))
        tokens = [token.id async for token in generation]
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == 24 or tokens[-1] in session.tokenizer.eos_ids


async def test_a_text_ends_with_the_table_of_positions(tiny_checkpoint):
    path = tiny_checkpoint(family="opt", **SHAPES["opt"]["norms first"])
    async with open_memory_swarm(path, SPANS) as swarm, swarm.session(*SPANS) as session:
        limit = session.max_positions
        with pytest.raises(UsageError, match=f"the model's context is {limit}"):
            session.generate([5] * limit)
        generation = session.generate(prompt(limit - 3, 301), GenerateOptions(max_new_tokens=9))
        tokens = [token.id async for token in generation]
        assert (generation.finish_reason, len(tokens), len(session.ids)) == ("length", 3, limit)


def test_the_reference_reaches_as_far(tiny_checkpoint):
    """The last position is one that transformers has too, and there is none after it."""
    path = tiny_checkpoint(family="opt", **SHAPES["opt"]["norms first"])
    model = load_reference(path)
    limit = SHAPES["opt"]["norms first"]["max_position_embeddings"]
    assert model(torch.full((1, limit), 5)).logits.shape[1] == limit
    with pytest.raises(IndexError):
        model(torch.full((1, limit + 1), 5))
