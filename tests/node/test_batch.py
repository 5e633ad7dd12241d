"""Several prompts in one session: each as it would be alone, and none costs more than its own."""

import pytest

from petalnode.errors import UsageError
from petalnode.models.sampling import SamplingConfig
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .test_chain import ONE, TWO, prompt, reference_tokens

LENGTHS = (40, 3, 290, 1)
SAMPLED = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, seed=7, repetition_penalty=1.1)


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


async def finish(batch):
    tokens = [[] for _ in batch.completions]
    async for index, token in batch:
        tokens[index].append(token)
    for index, completion in enumerate(batch.completions):
        assert [token.id for token in tokens[index]] == completion.tokens
        assert "".join(token.text for token in tokens[index]) == completion.text
    return tokens


async def test_greedy_prompts_equal_those_alone(checkpoint):
    async with open_memory_swarm(checkpoint, TWO) as swarm, swarm.session(*TWO, rows=4) as session:
        session.tokenizer.eos_ids = frozenset()
        batch = session.generate_batch([prompt(n) for n in LENGTHS], GenerateOptions(30))
        tokens = await finish(batch)
    for index, n in enumerate(LENGTHS):
        assert batch.completions[index].tokens == reference_tokens(checkpoint, prompt(n), 30)
        assert batch.completions[index].finish_reason == "length"
        assert [token.position for token in tokens[index]] == list(range(n, n + 30))


async def test_sampled_prompts_equal_those_alone_with_the_same_seed(checkpoint):
    options = GenerateOptions(30, SAMPLED)
    async with open_memory_swarm(checkpoint, TWO) as swarm, swarm.session(*TWO, rows=4) as session:
        batch = session.generate_batch([prompt(n) for n in LENGTHS], options)
        await finish(batch)
        for index, n in enumerate(LENGTHS):
            session.rollback(0)
            alone = session.generate(prompt(n), options)
            assert batch.completions[index].tokens == [token.id async for token in alone]
            assert batch.completions[index].text == alone.text


async def test_a_row_that_has_ended_costs_nothing(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE, rows=2) as session:
        session.tokenizer.eos_ids = frozenset()
        first = reference_tokens(checkpoint, prompt(3), 20)
        end = next(n for n, token in enumerate(first) if n >= 4 and token not in first[:n])
        other = reference_tokens(checkpoint, prompt(40), 20)
        assert first[end] not in other
        session.tokenizer.eos_ids = frozenset({first[end]})
        batch = session.generate_batch([prompt(3), prompt(40)], GenerateOptions(20))
        await finish(batch)
        assert [one.finish_reason for one in batch.completions] == ["stop", "length"]
        assert [one.tokens for one in batch.completions] == [first[: end + 1], other]
        assert swarm.servers["a"].engine.tokens == 3 + 40 + end + 19


async def test_prompts_may_be_texts_and_stop_at_texts():
    spans = [("a", 0, 8)]
    async with open_memory_swarm("demo", spans) as swarm, swarm.session(*spans, rows=2) as session:
        texts = ["import os\n", "def fibonacci(n):"]
        alone = []
        for text in texts:
            session.rollback(0)
            generation = session.generate(text, GenerateOptions(20))
            alone.append("".join([token.text async for token in generation]))
        batch = session.generate_batch(texts, GenerateOptions(20))
        await finish(batch)
        assert [one.text for one in batch.completions] == alone
        stop = alone[0][4:8]
        batch = session.generate_batch(texts, GenerateOptions(20, stop=(stop,)))
        await finish(batch)
        assert batch.completions[0].text == alone[0][: alone[0].index(stop)]


async def test_the_context_ends_a_row(tiny_checkpoint):
    checkpoint = tiny_checkpoint(max_position_embeddings=32, eos_token_id=None)
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE, rows=4) as session:
        session.tokenizer.eos_ids = frozenset()
        for beams in (1, 2):
            batch = session.generate_batch(
                [prompt(30), prompt(5)], GenerateOptions(9, num_beams=beams)
            )
            await finish(batch)
            assert [len(one.tokens) for one in batch.completions] == [2, 9]


async def test_bad_batches_are_refused_before_anything_changes(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE, rows=2) as session:
        session.append(prompt(5))
        for prompts, beams in (
            ([], 1),
            ([[5], []], 1),
            ([[5], [384]], 1),
            ([[5], [5] * 2048], 1),
            ([[5]] * 3, 1),
            ([[5]] * 2, 2),
        ):
            with pytest.raises(UsageError):
                session.generate_batch(prompts, GenerateOptions(num_beams=beams))
        assert session.ids == prompt(5)
