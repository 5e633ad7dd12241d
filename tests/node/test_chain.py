"""Whole chains over memory streams: exactness, rollback, failures, and what is freed after."""

from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
import trio

import petalnode.demo
from petalnode.errors import PeerGone, PeerMisbehaved, PeerRefused, PeerUnreachable, UsageError
from petalnode.models.sampling import SamplingConfig
from petalnode.p2p.memory import memory_frame_pair
from petalnode.protocol import HOP_PROTOCOL, MAX_STEP_TOKENS, Open, Segment, Step
from petalnode.session.chain import chunks
from petalnode.session.session import GenerateOptions

from .memory_swarm import open_memory_swarm

ONE = [("a", 0, 4)]
TWO = [("a", 0, 2), ("b", 2, 4)]
FOUR = [("a", 0, 1), ("b", 1, 2), ("c", 2, 3), ("d", 3, 4)]


DEMO = Path(petalnode.demo.__file__).parent
ODD_SHAPES = {
    "every head its own": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim unlike hidden/heads": {"head_dim": 26, "hidden_size": 60},
    "scaled rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@cache
def load_reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def reference_tokens(path, ids, new_tokens):
    return list(cached_reference_tokens(path, tuple(ids), new_tokens))


@cache
def cached_reference_tokens(path, ids, new_tokens):
    model = load_reference(path)
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(ids) :].tolist()


async def greedy_tokens(path, spans, ids, new_tokens):
    async with open_memory_swarm(path, spans) as swarm, swarm.session(*spans) as session:
        session.tokenizer.eos_ids = frozenset()
        return await greedy(session, ids, new_tokens)


async def greedy(session, ids, new_tokens):
    generation = session.generate(ids, GenerateOptions(max_new_tokens=new_tokens))
    return [token.id async for token in generation]


def prompt(n):
    return [(7 * i * i + 3 * i) % 300 + 2 for i in range(n)]


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.mark.parametrize("spans", [ONE, TWO, FOUR], ids=["1 hop", "2 hops", "4 hops"])
@pytest.mark.parametrize("length", [1, 7, 900])
async def test_greedy_equals_transformers(checkpoint, spans, length):
    expected = reference_tokens(checkpoint, prompt(length), 200)
    assert await greedy_tokens(checkpoint, spans, prompt(length), 200) == expected


@pytest.mark.parametrize("shape", ODD_SHAPES)
async def test_greedy_equals_transformers_in_odd_shapes(tiny_checkpoint, shape):
    checkpoint = tiny_checkpoint(**ODD_SHAPES[shape])
    expected = reference_tokens(checkpoint, prompt(7), 200)
    assert await greedy_tokens(checkpoint, TWO, prompt(7), 200) == expected


@pytest.mark.parametrize("hops", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 900])
async def test_greedy_equals_transformers_with_the_bundled_model(hops, length):
    size = 8 // hops
    spans = [(f"peer {i}", i * size, (i + 1) * size) for i in range(hops)]
    expected = reference_tokens(DEMO, prompt(length), 200)
    assert await greedy_tokens(DEMO, spans, prompt(length), 200) == expected


async def test_hops_may_use_parts_of_their_spans(checkpoint):
    expected = reference_tokens(checkpoint, prompt(7), 50)
    wide = [("a", 0, 3), ("b", 1, 4)]
    async with open_memory_swarm(checkpoint, wide) as swarm:
        for cut in (1, 2, 3):
            async with swarm.session(("a", 0, cut), ("b", cut, 4)) as session:
                assert await greedy(session, prompt(7), 50) == expected


async def test_two_sessions_interleaved_on_the_same_nodes(checkpoint):
    prompts = [prompt(7), prompt(300)]
    expected = [reference_tokens(checkpoint, ids, 100) for ids in prompts]
    results = {}
    async with open_memory_swarm(checkpoint, TWO) as swarm:

        async def one(index):
            async with swarm.session(*TWO) as session:
                results[index] = await greedy(session, prompts[index], 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            nursery.start_soon(one, 1)
    assert [results[0], results[1]] == expected


async def test_rollback_and_another_way_on(checkpoint):
    ids = prompt(20)
    expected = reference_tokens(checkpoint, [*ids[:12], 5, 6], 30)
    async with open_memory_swarm(checkpoint, TWO) as swarm, swarm.session(*TWO) as session:
        await greedy(session, ids, 10)
        session.rollback(12)
        assert await greedy(session, [5, 6], 30) == expected


async def test_sampling_with_a_seed_is_the_same_through_any_chain(checkpoint):
    sampling = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, seed=7)
    options = GenerateOptions(max_new_tokens=60, sampling=sampling)
    texts = set()
    for spans in (ONE, TWO, FOUR):
        async with open_memory_swarm(checkpoint, spans) as swarm, swarm.session(*spans) as session:
            texts.add(tuple([token.id async for token in session.generate(prompt(9), options)]))
    assert len(texts) == 1


async def test_rows_of_unequal_length_in_one_chain(checkpoint):
    """Rows are for beams and batches later; the wire and the hops know them now."""
    async with open_memory_swarm(checkpoint, TWO) as swarm:

        def embed(ids):
            return swarm.client.embed(torch.tensor(ids), torch.arange(len(ids)))

        lengths = (3, MAX_STEP_TOKENS + 5)
        alone = []
        for n in lengths:
            async with swarm.chain(*TWO) as chain:
                hidden = embed(prompt(n))
                alone.append(await chain.forward([Segment(0, 0, n, n)], hidden))
        async with swarm.chain(*TWO, rows=2) as chain:
            hidden = torch.cat([embed(prompt(n)) for n in lengths])
            both = await chain.forward(
                [Segment(row, 0, n, n) for row, n in enumerate(lengths)], hidden
            )
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)


async def test_everything_is_freed_when_the_session_ends(checkpoint):
    async with open_memory_swarm(checkpoint, TWO) as swarm:
        async with swarm.session(*TWO) as session:
            await greedy(session, prompt(5), 5)
            assert all(s.budget.tokens_free == 100_000 - 64 for s in swarm.servers.values())
        await trio.testing.wait_all_tasks_blocked()
        assert [s.server.sessions for s in swarm.servers.values()] == [0, 0]
        assert all(s.budget.tokens_free == 100_000 for s in swarm.servers.values())


async def test_cancelling_in_the_middle_frees_everything(checkpoint):
    async with open_memory_swarm(checkpoint, TWO) as swarm:
        with trio.CancelScope() as scope:
            async with swarm.session(*TWO) as session:
                async for token in session.generate(prompt(5), GenerateOptions(max_new_tokens=50)):
                    if token.position == 10:
                        scope.cancel()
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert all(s.budget.tokens_free == 100_000 for s in swarm.servers.values())


async def test_a_full_cache_is_a_refusal_that_says_so(checkpoint):
    async with open_memory_swarm(checkpoint) as swarm:
        swarm.add("a", 0, 4, kv_tokens=20)
        async with swarm.session(("a", 0, 4)) as session:
            with pytest.raises(PeerRefused, match="busy") as caught:
                await greedy(session, prompt(30), 5)
    assert caught.value.code == "busy"


async def test_blocks_that_a_peer_does_not_hold_are_refused(checkpoint):
    async with open_memory_swarm(checkpoint, TWO) as swarm:
        with pytest.raises(PeerRefused, match="blocks 0:2"):
            async with swarm.chain(("a", 0, 3), ("b", 3, 4)):
                pytest.fail("it opened")


async def test_a_draining_peer_refuses(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        swarm.servers["a"].server.draining = True
        with pytest.raises(PeerRefused) as caught:
            async with swarm.chain(*ONE):
                pytest.fail("it opened")
    assert caught.value.code == "draining"


async def test_another_model_is_refused(checkpoint, tiny_checkpoint):
    other = tiny_checkpoint(seed=1)
    async with open_memory_swarm(checkpoint, ONE) as swarm, open_memory_swarm(other) as wrong:
        wrong.servers = swarm.servers
        with pytest.raises(PeerRefused, match="another model"):
            async with wrong.chain(*ONE):
                pytest.fail("it opened")


async def test_a_peer_that_is_not_there_is_named(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        with pytest.raises(PeerUnreachable, match="ghost"):
            async with swarm.chain(("a", 0, 2), ("ghost", 2, 4)):
                pytest.fail("it opened")
        await trio.testing.wait_all_tasks_blocked()
        assert swarm.servers["a"].server.sessions == 0


async def test_a_prompt_longer_than_the_context(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE) as session:
        with pytest.raises(UsageError, match="2048"):
            session.generate([5] * 2048)
        assert session.ids == []


async def test_generation_stops_at_the_end_of_the_context(tiny_checkpoint):
    checkpoint = tiny_checkpoint(max_position_embeddings=32, eos_token_id=None)
    async with open_memory_swarm(checkpoint, ONE) as swarm, swarm.session(*ONE) as session:
        generation = session.generate(prompt(30), GenerateOptions(max_new_tokens=50))
        tokens = [token async for token in generation]
    assert (len(tokens), generation.finish_reason) == (2, "length")


class Garbler:
    """An opener whose one peer answers ``opened`` and then ``replies``."""

    def __init__(self, nursery, replies):
        self._nursery, self._replies = nursery, replies
        self._stepped = trio.Event()

    async def open_stream(self, peer_id, protocol):
        ours, theirs = memory_frame_pair("client", peer_id)
        self._nursery.start_soon(self._answer, theirs)
        return ours

    async def _answer(self, stream):
        with suppress(PeerGone):
            first = await stream.receive()
            if first.header["type"] == "feed":
                await stream.send({"type": "fed"})
                while await stream.receive() is not None:
                    self._stepped.set()
            await stream.send({"type": "opened"})
            await self._stepped.wait()
            for header, tensors in self._replies:
                await stream.send(header, tensors)
            await stream.aclose()


OUT = Step(1, (Segment(0, 0, 1, 1),), "out").to_wire()
GARBAGE = {
    "unknown type": ({"type": "dance"}, []),
    "no type": ({}, []),
    "output of wrong shape": (OUT, [torch.zeros(2, 64)]),
    "output without tensor": (OUT, []),
    "segments are nonsense": ({**OUT, "segments": "x"}, []),
    "opened again": ({"type": "opened"}, []),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_from_a_hop_is_its_fault(checkpoint, name):
    async with open_memory_swarm(checkpoint) as swarm, trio.open_nursery() as nursery:
        swarm.open_stream = Garbler(nursery, [GARBAGE[name]]).open_stream
        with pytest.raises(PeerMisbehaved) as caught:
            async with swarm.chain(*ONE) as chain:
                await chain.forward([Segment(0, 0, 1, 1)], torch.zeros(1, 64))
    assert caught.value.peer_id == "a"


async def test_a_hop_that_ends_the_stream_is_gone(checkpoint):
    async with open_memory_swarm(checkpoint) as swarm, trio.open_nursery() as nursery:
        swarm.open_stream = Garbler(nursery, []).open_stream
        with pytest.raises(PeerGone):
            async with swarm.chain(*ONE) as chain:
                await chain.forward([Segment(0, 0, 1, 1)], torch.zeros(1, 64))


async def test_a_hop_that_never_answers_is_given_up(checkpoint, autojump_clock):
    class Silent:
        async def open_stream(self, peer_id, protocol):
            self.stream, self.other = memory_frame_pair("client", peer_id)
            return self.stream

    async with open_memory_swarm(checkpoint) as swarm:
        silent = Silent()
        swarm.open_stream = silent.open_stream
        with pytest.raises(PeerGone, match="did not open"):
            async with swarm.chain(*ONE):
                pytest.fail("it opened")


def opening(session=b"s" * 16, **changes):
    return {**Open(session, "f" * 32, 0, 4, 1).to_wire(), **changes}


BAD_FIRSTS = {
    "no type": {},
    "step before open": Step(1, (Segment(0, 0, 1, 1),)).to_wire(),
    "short session id": opening(session=b"s"),
    "empty blocks": opening(blocks=[2, 2]),
    "negative block": opening(blocks=[-1, 2]),
    "blocks not numbers": opening(blocks=["0", True]),
    "no rows": opening(rows=0),
    "too many rows": opening(rows=10**9),
    "sender not text": opening(sender=5),
    "fingerprint too long": opening(fingerprint="f" * 10_000),
}


@pytest.mark.parametrize("name", BAD_FIRSTS)
async def test_a_client_that_talks_garbage_loses_its_stream_only(checkpoint, name):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        bad = await swarm.open_stream("a", HOP_PROTOCOL)
        await bad.send(BAD_FIRSTS[name])
        with pytest.raises(PeerGone):
            await bad.receive()
        assert isinstance(swarm.errors[0], PeerMisbehaved)
        async with swarm.session(*ONE) as session:
            assert len(await greedy(session, prompt(3), 3)) == 3


async def opened_and_fed(swarm):
    """Control and feed stream of a session at peer a."""
    control = await swarm.open_stream("a", HOP_PROTOCOL)
    await control.send(opening(fingerprint=swarm.checkpoint.fingerprint))
    assert (await control.receive()).header == {"type": "opened"}
    feed = await swarm.open_stream("a", HOP_PROTOCOL)
    await feed.send({"type": "feed", "session": b"s" * 16})
    assert (await feed.receive()).header == {"type": "fed"}
    return control, feed


BAD_STEPS = {
    "row out of range": ([[5, 0, 1, 1]], torch.zeros(1, 64)),
    "row twice": ([[0, 0, 1, 1], [0, 1, 1, 1]], torch.zeros(2, 64)),
    "no segments": ([], torch.zeros(0, 64)),
    "absurd length": ([[0, 0, 10**9, 1]], torch.zeros(1, 64)),
    "wants more than it sends": ([[0, 0, 1, 2]], torch.zeros(1, 64)),
    "hidden size": ([[0, 0, 1, 1]], torch.zeros(1, 63)),
    "integers": ([[0, 0, 1, 1]], torch.zeros(1, 64, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", BAD_STEPS)
async def test_a_step_that_breaks_the_protocol_ends_its_feed(checkpoint, name):
    segments, hidden = BAD_STEPS[name]
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        control, feed = await opened_and_fed(swarm)
        await feed.send({"type": "step", "seq": 1, "segments": segments}, [hidden])
        with pytest.raises(PeerGone):
            await feed.receive()
        assert isinstance(swarm.errors[0], PeerMisbehaved)
        control.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert swarm.servers["a"].server.sessions == 0


async def test_a_gap_is_reported_and_the_session_goes_on(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        control, feed = await opened_and_fed(swarm)
        await feed.send(Step(1, (Segment(0, 9, 1, 1),)).to_wire(), [torch.zeros(1, 64)])
        assert (await control.receive()).header["code"] == "gap"
        await feed.send(Step(2, (Segment(0, 0, 1, 1),)).to_wire(), [torch.zeros(1, 64)])
        assert (await control.receive()).header["type"] == "out"


async def test_only_the_named_sender_may_feed(checkpoint):
    async with open_memory_swarm(checkpoint, ONE) as swarm:
        control = await swarm.open_stream("a", HOP_PROTOCOL)
        fingerprint = swarm.checkpoint.fingerprint
        await control.send(opening(fingerprint=fingerprint, sender="friend"))
        await control.receive()
        foe, friend = swarm.dial("foe", "a"), swarm.dial("friend", "a")
        await foe.send({"type": "feed", "session": b"s" * 16})
        assert (await foe.receive()).header["type"] == "refused"
        await friend.send({"type": "feed", "session": b"s" * 16})
        assert (await friend.receive()).header["type"] == "fed"


def test_chunks_keep_order_and_wanted_outputs():
    cut = chunks([Segment(0, 10, 5, 2), Segment(1, 0, 4, 4)], 3)
    assert cut == [
        [Segment(0, 10, 3, 0)],
        [Segment(0, 13, 2, 2), Segment(1, 0, 1, 1)],
        [Segment(1, 1, 3, 3)],
    ]
