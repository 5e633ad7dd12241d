"""Generation: what is counted, when it stops, and text that is whole."""

import pytest

from petalnode.errors import UsageError
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm

SPANS = [("a", 0, 4), ("b", 4, 8)]


async def generate(session, prompt, **options):
    generation = session.generate(prompt, GenerateOptions(**options))
    return generation, [token async for token in generation]


@pytest.fixture
async def session():
    async with open_memory_swarm("demo", SPANS) as swarm, swarm.session(*SPANS) as session:
        yield session


async def test_pieces_join_to_the_text_and_positions_count_on(session):
    generation, tokens = await generate(session, "import os\n", max_new_tokens=12)
    assert "".join(token.text for token in tokens) == generation.text
    assert [token.id for token in tokens] == generation.tokens
    assert [token.position for token in tokens] == list(
        range(len(session.ids) - len(tokens), len(session.ids))
    )
    assert generation.ttft_s is not None
    assert generation.tokens_per_s > 0


async def test_a_stop_text_ends_the_generation_and_is_left_out(session):
    whole, _ = await generate(session, "import os\n", max_new_tokens=30)
    stop = whole.text[3:6]
    session.rollback(0)
    cut, _ = await generate(session, "import os\n", max_new_tokens=30, stop=(stop,))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


async def test_going_on_is_the_same_as_not_having_stopped(session):
    whole, _ = await generate(session, "import os\n", max_new_tokens=20)
    session.rollback(0)
    first, _ = await generate(session, "import os\n", max_new_tokens=8)
    rest = session.generate([], GenerateOptions(max_new_tokens=12))
    assert first.tokens + [token.id async for token in rest] == whole.tokens


async def test_logits_of_all_positions_equal_those_step_by_step(session):
    ids = session.tokenizer.encode("for x in range(10):")
    at_once = await session.logits(ids)
    session.rollback(0)
    for index, one in enumerate(ids):
        (logits,) = await session.logits([one])
        assert (logits - at_once[index]).abs().max() < 1e-4


async def test_an_empty_prompt_and_a_bad_rollback_are_usage_errors(session):
    with pytest.raises(UsageError):
        session.generate([])
    with pytest.raises(UsageError):
        session.rollback(1)
    with pytest.raises(UsageError):
        GenerateOptions(max_new_tokens=0)
