"""Beam search: token by token what transformers finds, through any chain, whatever dies."""

import random
from functools import cache

import pytest
import torch
import trio
import trio.testing

from petalnode.errors import UsageError
from petalnode.models.sampling import SamplingConfig
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm
from .test_chain import DEMO, FOUR, ONE, TWO, load_reference, prompt
from .test_recovery import SPANS, SPARES, Finder

NEW = 24
EOS = (1, 7, 11)
"""Ends a text: three of 384 ids, so that beams end at different lengths."""


@cache
def beams_of_transformers(path, ids, num_beams, new, eos=EOS, **options):
    model = load_reference(path)
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        **options,
    )
    new_ids = output[0, len(ids) :].tolist()
    ends = [place for place, token in enumerate(new_ids) if token in eos]
    return new_ids[: ends[0] + 1] if ends else new_ids


def expected(path, ids, num_beams, new=NEW, eos=EOS, **options):
    return beams_of_transformers(path, tuple(ids), num_beams, new, eos, **options)


async def search(session, ids, num_beams, new=NEW, eos=EOS, **options):
    session.tokenizer.eos_ids = frozenset(eos)
    generation = session.generate(ids, GenerateOptions(new, num_beams=num_beams, **options))
    tokens = [token async for token in generation]
    assert [token.id for token in tokens] == generation.tokens
    assert [token.position for token in tokens] == list(range(len(ids), len(ids) + len(tokens)))
    return generation.tokens


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.mark.parametrize("spans", [ONE, TWO, FOUR], ids=["1 hop", "2 hops", "4 hops"])
@pytest.mark.parametrize("num_beams", [2, 4])
async def test_beams_equal_transformers(checkpoint, spans, num_beams):
    async with (
        open_memory_swarm(checkpoint, spans) as swarm,
        swarm.session(*spans, rows=num_beams) as session,
    ):
        for length in (1, 7, 300):
            session.rollback(0)
            found = await search(session, prompt(length), num_beams)
            assert found == expected(checkpoint, prompt(length), num_beams)


@pytest.mark.parametrize("num_beams", [2, 4])
async def test_beams_equal_transformers_with_the_bundled_model(num_beams):
    spans = [("a", 0, 3), ("b", 3, 8)]
    async with (
        open_memory_swarm(DEMO, spans) as swarm,
        swarm.session(*spans, rows=num_beams) as session,
    ):
        for text in ("import os\n", "def fibonacci(n):"):
            ids = session.tokenizer.encode(text, add_special=True)
            session.rollback(0)
            eos = session.tokenizer.eos_ids
            found = await search(session, ids, num_beams, 60, tuple(eos))
            assert found == expected(DEMO, ids, num_beams, 60, tuple(eos))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 3.0])
async def test_length_and_repetition_penalties_equal_transformers(checkpoint, penalty):
    sampling = SamplingConfig(repetition_penalty=1.3)
    async with (
        open_memory_swarm(checkpoint, ONE) as swarm,
        swarm.session(*ONE, rows=3) as session,
    ):
        for length in (2, 9, 30):
            session.rollback(0)
            found = await search(
                session, prompt(length), 3, length_penalty=penalty, sampling=sampling
            )
            options = {"length_penalty": penalty, "repetition_penalty": 1.3}
            assert found == expected(checkpoint, prompt(length), 3, **options)


async def test_prompts_of_unequal_length_in_one_batch(checkpoint):
    lengths = (40, 3, 290, 1)
    async with (
        open_memory_swarm(checkpoint, TWO) as swarm,
        swarm.session(*TWO, rows=16) as session,
    ):
        session.tokenizer.eos_ids = frozenset(EOS)
        batch = session.generate_batch(
            [prompt(length) for length in lengths], GenerateOptions(NEW, num_beams=4)
        )
        tokens = [(index, token) async for index, token in batch]
    for index, length in enumerate(lengths):
        want = expected(checkpoint, prompt(length), 4)
        assert batch.completions[index].tokens == want
        assert [token.id for which, token in tokens if which == index] == want


async def test_a_prompt_is_computed_once_whatever_its_beams(checkpoint):
    async with (
        open_memory_swarm(checkpoint, ONE) as swarm,
        swarm.session(*ONE, rows=4) as session,
    ):
        await search(session, prompt(300), 4, 10, ())
        assert swarm.servers["a"].engine.tokens == 300 + 9 * 4


async def test_a_session_goes_on_after_a_search(checkpoint):
    """The best sequence is its own then; what its row had in common with it is not fed again."""
    async with (
        open_memory_swarm(checkpoint, TWO) as swarm,
        swarm.session(*TWO, rows=2) as session,
    ):
        first = await search(session, prompt(200), 2, eos=())
        assert session.ids == [*prompt(200), *first]
        before = swarm.servers["a"].engine.tokens
        ids = [*session.ids, 5, 6]
        second = session.generate([5, 6], GenerateOptions(8, num_beams=2))
        assert [token.id async for token in second] == expected(checkpoint, ids, 2, 8, ())
        assert swarm.servers["a"].engine.tokens - before < 60
        ids = [*session.ids, 9]
        plain = session.generate([9], GenerateOptions(8))
        assert [token.id async for token in plain] == expected(checkpoint, ids, 1, 8, ())


async def test_a_search_that_was_left_does_not_go_on_and_the_session_does(checkpoint):
    async with (
        open_memory_swarm(checkpoint, TWO) as swarm,
        swarm.session(*TWO, rows=2) as session,
    ):
        session.tokenizer.eos_ids = frozenset()
        left = session.generate(prompt(20), GenerateOptions(NEW, num_beams=2))
        await anext(left)
        session.rollback(10)
        again = session.generate([], GenerateOptions(NEW, num_beams=2))
        found = [token.id async for token in again]
        assert found == expected(checkpoint, prompt(10), 2, NEW, ())
        with pytest.raises(UsageError, match="used for something else"):
            async for _ in left:
                pass


async def test_what_beams_cannot_do_is_said(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE) as session:
        with pytest.raises(UsageError, match="rows"):
            session.generate([5], GenerateOptions(num_beams=2))
        assert session.ids == []
    for wrong in (
        {"num_beams": 0},
        {"num_beams": 65},
        {"num_beams": 2, "stop": ("x",)},
        {"num_beams": 2, "sampling": SamplingConfig(temperature=1.0)},
        {"length_penalty": float("nan")},
    ):
        with pytest.raises(UsageError):
            GenerateOptions(**wrong)


class Disturbed:
    """Four prompts' beams over four hops, and what happens at which step of the search."""

    def __init__(self, checkpoint, num_beams=2, lengths=(40, 3, 11), new=16):
        self.checkpoint, self.num_beams, self.new = checkpoint, num_beams, new
        self.prompts = [prompt(length) for length in lengths]
        self.steps = 0

    async def run(self, spans, disturb):
        async with open_memory_swarm(self.checkpoint, spans) as swarm:
            self.finder = Finder(swarm)
            rows = self.num_beams * len(self.prompts)
            async with swarm.session(*SPANS, rows=rows, replacements=self.finder) as session:
                session.tokenizer.eos_ids = frozenset(EOS)
                forward = session.chain.forward

                async def disturbed(*step):
                    self.steps += 1
                    await disturb(swarm, self.steps, session)
                    return await forward(*step)

                session.chain.forward = disturbed
                options = GenerateOptions(self.new, num_beams=self.num_beams)
                batch = session.generate_batch(self.prompts, options)
                async for _ in batch:
                    pass
            await trio.testing.wait_all_tasks_blocked()
            for server in swarm.servers.values():
                assert server.budget.tokens_free == 100_000
                assert server.server.sessions == 0
        for ids, completion in zip(self.prompts, batch.completions, strict=True):
            want = expected(self.checkpoint, ids, self.num_beams, self.new)
            assert completion.tokens == want


@pytest.mark.parametrize("peers", ["a", "b", "d", "bc", "abcd"])
@pytest.mark.parametrize("at", [2, 3, 7])
async def test_hops_die_between_steps(checkpoint, peers, at):
    async def kill(swarm, step, session):
        if step == at:
            for peer in peers:
                swarm.kill(peer)

    search = Disturbed(checkpoint)
    await search.run([*SPANS, *SPARES], kill)
    assert {error.peer_id for error in search.finder.blamed} == set(peers)


@pytest.mark.parametrize("peer", "abcd")
@pytest.mark.parametrize("call", [1, 2, 6])
async def test_a_hop_dies_while_it_computes(checkpoint, peer, call):
    """Before it sends a step that its receiver does not have, rearranged or not."""

    async def prepare(swarm, step, session):
        if step > 1:
            return
        engine = swarm.servers[peer].engine
        run, calls = engine.run, []

        async def dies(start, end, rows, hidden):
            calls.append(start)
            if len(calls) == call:
                swarm.kill(peer)
                await trio.sleep_forever()
            return await run(start, end, rows, hidden)

        engine.run = dies

    search = Disturbed(checkpoint)
    await search.run([*SPANS, *SPARES], prepare)
    assert {error.peer_id for error in search.finder.blamed} == {peer}


async def test_hops_that_do_not_meet_are_relayed_and_die(checkpoint):
    async def part(swarm, step, session):
        if step == 3:
            swarm.part("b", "c")
        if step == 6:
            swarm.kill("c")
        if step == 9:
            swarm.kill("b")

    search = Disturbed(checkpoint, num_beams=4, lengths=(30,))
    await search.run([*SPANS, *SPARES], part)
    assert search.finder.events[-1][1] == ["a", "b2", "c2", "d"]


@pytest.mark.parametrize("peer", "abd")
async def test_a_hop_drains_during_a_search(checkpoint, peer):
    async def drain(swarm, step, session):
        if step == 3:
            await swarm.servers[peer].server.drain()
            await trio.testing.wait_all_tasks_blocked(0.02)

    search = Disturbed(checkpoint, num_beams=4, lengths=(300,))
    await search.run([*SPANS, *SPARES], drain)
    assert search.finder.blamed == []


@pytest.mark.parametrize("seed", range(6))
async def test_random_deaths(checkpoint, seed):
    chance = random.Random(seed)
    spans = [*SPANS, *SPARES, ("x", 0, 2), ("y", 1, 4), ("z", 0, 4), ("w", 2, 4)]

    async def misfortune(swarm, step, session):
        hops = [hop.peer_id for hop in session.chain.hops]
        if chance.random() < 0.3 and len(swarm.servers) > 4:
            victim = chance.choice(hops)
            others = [
                server.engine.span for peer, server in swarm.servers.items() if peer != victim
            ]
            if all(any(s.start <= block < s.end for s in others) for block in range(4)):
                swarm.kill(victim)
        elif chance.random() < 0.15 and len(hops) > 1:
            place = chance.randrange(len(hops) - 1)
            if hops[place] != hops[place + 1]:
                swarm.part(hops[place], hops[place + 1])

    num_beams = chance.choice([1, 2, 4])
    lengths = [chance.choice([1, 5, 40, 270]) for _ in range(chance.choice([1, 2, 3]))]
    await Disturbed(checkpoint, num_beams, lengths).run(spans, misfortune)
