"""A soft prompt before the text: token by token what transformers makes of the same vectors."""

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_client
from petalnode.models.sampling import SamplingConfig
from petalnode.session.session import GenerateOptions
from petalnode.session.soft_prompt import PromptedClient

from .memory_swarm import open_memory_swarm
from .test_chain import TWO, load_reference, prompt
from .test_recovery import SPARES, Finder

NEW = 12
PROMPT = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * 0.5


def expected(path, ids, **options):
    model = load_reference(path)
    embedded = torch.cat((PROMPT, model.get_input_embeddings()(torch.tensor(ids))))
    output = model.generate(
        inputs_embeds=embedded[None],
        attention_mask=torch.ones(1, len(embedded), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return output[0].tolist()


async def tokens_of(generation):
    return [token.id async for token in generation]


@pytest.fixture
def path(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


async def test_one_row_also_where_a_hop_dies(path):
    ids = prompt(9)
    async with open_memory_swarm(path, [*TWO, *SPARES]) as swarm:
        finder = Finder(swarm)
        async with swarm.session(*TWO, replacements=finder, soft_prompt=PROMPT) as session:
            session.tokenizer.eos_ids = frozenset()
            generation = session.generate(ids, GenerateOptions(NEW))
            tokens = []
            async for token in generation:
                tokens.append(token.id)
                assert token.position == len(PROMPT) + len(ids) + len(tokens) - 1
                if len(tokens) == 4:
                    swarm.kill(TWO[0][0])
            assert tokens == expected(path, ids)


async def test_beams_and_batches(path):
    first, second = prompt(9), prompt(14)[10:]
    async with (
        open_memory_swarm(path, TWO) as swarm,
        swarm.session(*TWO, rows=4, soft_prompt=PROMPT) as session,
    ):
        session.tokenizer.eos_ids = frozenset()
        beams = session.generate(first, GenerateOptions(NEW, num_beams=3))
        assert await tokens_of(beams) == expected(path, first, num_beams=3)
        batch = session.generate_batch([first, second], GenerateOptions(NEW))
        async for _ in batch:
            pass
        assert batch.completions[0].tokens == expected(path, first)
        assert batch.completions[1].tokens == expected(path, second)
        assert session.ids == list(session.prefix)


async def test_turns_rollback_and_penalties_know_nothing_of_it(path):
    ids = prompt(9)
    penalty = SamplingConfig(repetition_penalty=1.5)
    async with (
        open_memory_swarm(path, TWO) as swarm,
        swarm.session(*TWO, soft_prompt=PROMPT) as session,
    ):
        session.tokenizer.eos_ids = frozenset()
        await tokens_of(session.generate(prompt(3), GenerateOptions(NEW)))
        session.rollback(len(PROMPT))
        options = GenerateOptions(NEW, sampling=penalty)
        tokens = await tokens_of(session.generate(ids, options))
        assert len(tokens) == NEW
        with pytest.raises(UsageError, match="none to go back to"):
            session.rollback(len(PROMPT) - 1)
        session.rollback(len(PROMPT))
        with pytest.raises(UsageError, match="prompt is empty"):
            session.generate([])


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(5, 63), torch.zeros(5), torch.zeros(0, 64), torch.full((2, 64), float("nan"))],
    ids=["size", "dimensions", "empty", "nan"],
)
def test_prompts_that_fit_no_model(path, bad):
    with pytest.raises(UsageError):
        PromptedClient(load_client(open_checkpoint(str(path)), dtype="float32"), bad)


async def test_a_text_after_it_begins_with_the_special_tokens(path):
    async with (
        open_memory_swarm(path, TWO) as swarm,
        swarm.session(*TWO, soft_prompt=PROMPT) as session,
    ):
        encode, special = session.tokenizer.encode, []

        def told(text, add_special):
            special.append(add_special)
            return encode(text, add_special=add_special)

        session.tokenizer.encode = told
        await tokens_of(session.generate("def", GenerateOptions(1)))
        await tokens_of(session.generate("def", GenerateOptions(1)))
        session.rollback(len(PROMPT))
        await tokens_of(session.generate("def", GenerateOptions(1)))
        assert special == [True, False, True]


async def test_the_context_has_room_for_both(path):
    async with (
        open_memory_swarm(path, TWO) as swarm,
        swarm.session(*TWO, rows=2, soft_prompt=PROMPT) as session,
    ):
        session.tokenizer.eos_ids = frozenset()
        most = session.max_positions - len(PROMPT)
        with pytest.raises(UsageError, match="context"):
            session.generate_batch([[5] * 3, [5] * most])
        told = rf"makes {session.max_positions} tokens, {len(PROMPT)} of them the adapter's, but"
        with pytest.raises(UsageError, match=told):
            session.generate([5] * most)
        generation = session.generate([5] * (most - 2), GenerateOptions(NEW))
        assert len(await tokens_of(generation)) == 2
        assert generation.finish_reason == "length"
        session.rollback(len(PROMPT))
        beams = session.generate([5] * (most - 2), GenerateOptions(NEW, num_beams=2))
        assert len(await tokens_of(beams)) == 2


async def test_penalties_of_batches_and_beams_know_nothing_of_it(path):
    """Ids that stand for the prompt are none that a penalty could be looked up for."""
    sampling = SamplingConfig(repetition_penalty=1.5)
    async with (
        open_memory_swarm(path, TWO) as swarm,
        swarm.session(*TWO, rows=4, soft_prompt=PROMPT) as session,
    ):
        session.tokenizer.eos_ids = frozenset()
        options = GenerateOptions(NEW, sampling=sampling)
        alone = await tokens_of(session.generate(prompt(9), options))
        batch = session.generate_batch([prompt(9), prompt(4)], options)
        assert [token.id async for index, token in batch if index == 0] == alone
        session.rollback(len(PROMPT))
        beams = GenerateOptions(NEW, sampling=sampling, num_beams=3)
        assert len(await tokens_of(session.generate(prompt(9), beams))) == NEW


async def test_a_generation_that_was_rolled_back_to_it_alone_ends(path):
    async with (
        open_memory_swarm(path, TWO) as swarm,
        swarm.session(*TWO, soft_prompt=PROMPT) as session,
    ):
        generation = session.generate(prompt(9), GenerateOptions(NEW))
        await anext(generation)
        session.rollback(len(PROMPT))
        with pytest.raises(UsageError, match="rolled back to nothing"):
            await anext(generation)


def test_a_prompt_leaves_room_for_a_token(path):
    client = load_client(open_checkpoint(str(path)), dtype="float32")
    most = client.config.max_positions
    assert len(PromptedClient(client, torch.zeros(most - 1, 64)).prefix) == most - 1
    with pytest.raises(UsageError, match="Use a shorter prompt"):
        PromptedClient(client, torch.zeros(most, 64))
