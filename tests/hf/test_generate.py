"""``generate`` of transformers over the swarm: token by token what its own model gives."""

import copy
import pickle

import pytest
import torch
import trio
from transformers import GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

from petalnode.errors import UsageError
from petalnode.hf import PetalnodeForSequenceClassification

from .swarm_node import model_on, open_swarm_node
from .test_forward import batch, close

NEW = 12
EOS = [5, 7, 11, 23]
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several each": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 2},
}


def generate(model, ids, mask, seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": EOS}
    return model.generate(ids, attention_mask=mask, **defaults | options)


def assert_same(both, ids, mask, **options):
    want = generate(both.reference, ids, mask, **options)
    assert generate(both.model, ids, mask, **options).tolist() == want.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_for_a_left_padded_batch(each, way):
    ids, mask = batch("left", (9, 4, 1))
    assert_same(each, ids, mask, **WAYS[way])


def test_what_was_found_draws_on_every_token(both):
    """Guards the tests above: texts end at different lengths, and say different things."""
    ids, mask = batch("left", (9, 4, 1))
    found = generate(both.model, ids, mask, **WAYS["greedy"])[:, 9:].tolist()
    assert len({tuple(one) for one in found}) == 3
    assert len({token for one in found for token in one}) > 4


def test_candidates_that_are_looked_up_in_the_prompt(both):
    ids = batch(lengths=(6,))[0].repeat(1, 3)
    options = {"do_sample": False, "eos_token_id": None}
    want = generate(both.reference, ids, torch.ones_like(ids), **options)
    got = generate(both.model, ids, torch.ones_like(ids), prompt_lookup_num_tokens=3, **options)
    assert got.tolist() == want.tolist()


def test_scores_streamers_and_criteria(both):
    class Collect(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    ids, mask = batch(lengths=(6,))
    streamer = Collect()
    options = {
        "do_sample": False,
        "stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 10])],
        "return_dict_in_generate": True,
        "output_scores": True,
        "eos_token_id": None,
    }
    want = generate(both.reference, ids, mask, **options)
    got = generate(both.model, ids, mask, streamer=streamer, **options)
    assert got.sequences.tolist() == want.sequences.tolist() == [streamer.ids]
    assert streamer.ended
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), atol=1e-4, rtol=0)


def test_hidden_states_of_every_step_without_a_cache(both):
    ids, mask = batch("left", (6, 3))
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "use_cache": False}
    options |= {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    want = generate(both.reference, ids, mask, **options).hidden_states
    got = generate(both.model, ids, mask, **options).hidden_states
    for one, other in zip(got, want, strict=True):
        longer = torch.cat([mask, mask.new_ones(2, one[0].shape[1] - 6)], 1)
        for state, its in zip(one, other, strict=True):
            close(state, its, longer)


def test_what_the_authors_say_about_generating(nodes, tmp_path):
    for file in nodes("llama")[0].iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    GenerationConfig(max_new_tokens=3, pad_token_id=0).save_pretrained(tmp_path)
    ids, _ = batch(lengths=(6,))
    with open_swarm_node(tmp_path) as node:
        assert model_on(node).generate(ids).shape == (1, 6 + 3)
        (tmp_path / "generation_config.json").unlink()
        assert model_on(node).generation_config.max_new_tokens is None


def test_embeddings_as_the_prompt(both):
    ids, mask = batch("left", (6, 3))
    embeddings = both.model.get_input_embeddings()(ids)
    got = both.model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    want = generate(both.reference, ids, mask, do_sample=False)
    assert got.tolist() == want[:, ids.shape[1] :].tolist()


def test_it_goes_on_from_a_cache_that_was_returned(both):
    ids, mask = batch(lengths=(6,))
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = generate(both.model, ids, mask, **options)
    more = torch.cat([first.sequences, torch.tensor([[8, 9]])], 1)
    before = both.node.value.swarm.servers["a"].engine.tokens
    got = generate(
        both.model, more, torch.ones_like(more), past_key_values=first.past_key_values, **options
    )
    assert both.node.value.swarm.servers["a"].engine.tokens - before == 3 + NEW - 1
    want = generate(both.reference, more, torch.ones_like(more), **options)
    assert got.sequences.tolist() == want.sequences.tolist()


def test_a_prompt_is_computed_once_whatever_its_beams(both):
    ids, mask = batch(lengths=(30,))
    before = both.node.value.swarm.servers["a"].engine.tokens
    generate(both.model, ids, mask, num_beams=4, max_new_tokens=5, eos_token_id=None)
    assert both.node.value.swarm.servers["a"].engine.tokens - before == 30 + 4 * 4


def test_caches_are_freed_when_nobody_refers_to_them(both):
    ids, mask = batch(lengths=(6,))
    outputs = generate(both.model, ids, mask, return_dict_in_generate=True)
    servers = both.node.value.swarm.servers.values()
    assert [server.server.sessions for server in servers] == [1, 1]
    del outputs

    async def until_free():
        with trio.fail_after(60):
            while any(server.server.sessions for server in servers):
                await trio.lowlevel.checkpoint()

    both.node.run(until_free)


def test_what_cannot_be_is_said(both):
    ids, mask = batch("right", (6, 3))
    for use_cache in (True, False):
        with pytest.raises(UsageError, match="Pad on the left"):
            generate(both.model, ids, mask, use_cache=use_cache)
    ids, mask = batch(lengths=(6,))
    with pytest.raises(UsageError, match="cache_implementation"):
        generate(both.model, ids, mask, cache_implementation="static")
    with pytest.raises(UsageError, match="rows"):
        generate(both.model, ids, mask, num_beams=65)
    with pytest.raises(UsageError, match="use_cache=False"):
        generate(both.model, ids, mask, output_hidden_states=True, return_dict_in_generate=True)
    cache = both.model.new_cache()
    generate(both.model, ids, mask, past_key_values=cache)
    with pytest.raises(UsageError, match="copied"):
        copy.deepcopy(cache)
    for way in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="copied"):
            way(both.model)
    with pytest.raises(UsageError, match="4 rows"):
        cache.batch_repeat_interleave(4)


def test_pipelines_take_the_classes(both, caplog):
    classifier = model_on(both.node, PetalnodeForSequenceClassification, num_labels=2)
    both.model.generation_config.max_new_tokens = 2
    for task, model in (("text-generation", both.model), ("text-classification", classifier)):
        use = pipeline(task, model=model, tokenizer=model.load_tokenizer())
        assert len(use(["read the file", "a"])) == 2
    assert "not supported" not in caplog.text
