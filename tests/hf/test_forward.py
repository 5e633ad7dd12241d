"""``forward``: logits, loss and hidden states are those of transformers on the same checkpoint."""

import pytest
import torch

from petalnode.errors import PeerGone, UsageError
from petalnode.hf import freeze, unfreeze
from petalnode.hf.inputs import read_inputs
from petalnode.protocol import Segment

LABEL_OFF = -100


def batch(side="right", lengths=(7, 3, 5), seed=0):
    """Ids and attention mask [B, T], padded on a side."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    rng = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, where] = torch.randint(3, 290, (length,), generator=rng)
        mask[row, where] = 1
    return ids, mask


def close(one, other, mask=None, atol=1e-4):
    if mask is not None:
        one, other = one[mask.bool()], other[mask.bool()]
    torch.testing.assert_close(one.detach(), other.detach(), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_loss_with_padding(each, side):
    ids, mask = batch(side)
    labels = ids.masked_fill(mask.cumsum(1) * mask < 2, LABEL_OFF)  # a first token has none
    # transformers counts positions from the mask only where it is told them
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if each.reference.config.model_type not in ("bloom", "opt"):
        inputs["position_ids"] = positions
    want = each.reference(**inputs)
    got = each.model(**inputs)
    close(got.logits, want.logits, mask)
    close(got.loss, want.loss)
    assert got.past_key_values is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_has_the_loss_that_it_has_alone(both, side):
    ids, mask = batch(side, (7, 4))
    short = ids[1][mask[1].bool()][None]
    labels = ids.clone()
    labels[0] = LABEL_OFF
    alone = both.reference(input_ids=short, labels=short).loss
    close(both.model(ids, attention_mask=mask, labels=labels).loss, alone)


def test_without_a_mask_and_as_a_tuple(both):
    ids, _ = batch(lengths=(6, 6))
    want = both.reference(input_ids=ids, labels=ids, use_cache=False, return_dict=False)
    got = both.model(input_ids=ids, labels=ids, return_dict=False)
    assert type(got) is type(want) is tuple
    assert len(got) == len(want) == 2
    close(got[0], want[0])
    close(got[1], want[1])
    both.model.config.return_dict = False
    assert torch.equal(both.model(input_ids=ids)[0], got[1])


def test_ids_labels_and_positions_of_other_kinds(both):
    ids, _ = batch(lengths=(6, 6))
    want = both.model(ids, labels=ids)
    got = both.model(ids.int(), labels=ids.int(), position_ids=torch.arange(6)[None])
    assert torch.equal(got.logits, want.logits)
    assert got.loss == want.loss
    ids, mask = batch("left")
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as older loops have it
    got = both.model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(got, both.model(ids, attention_mask=mask).logits)
    counted = read_inputs(ids, None, mask, None, None).positions  # tables have none below 0
    assert torch.equal(counted, positions.masked_fill(mask == 0, 0))


def test_embeddings_instead_of_ids(each):
    ids, mask = batch()
    embeddings = each.model.get_input_embeddings()(ids)
    close(
        each.model(inputs_embeds=embeddings, attention_mask=mask).logits,
        each.model(ids, attention_mask=mask).logits,
        atol=1e-6,
    )


def test_hooks_on_embeddings_see_whole_rows(each):
    ids, mask = batch()
    want, seen = each.model(ids, attention_mask=mask).logits, []

    def turn(module, args, output):
        seen.append((args[0].shape, output.shape))
        return output.roll(1, 2)

    table = each.model.get_input_embeddings()
    hook = table.register_forward_hook(turn)
    got = each.model(ids, attention_mask=mask).logits
    hook.remove()
    assert seen == [(ids.shape, (*ids.shape, table.weight.shape[1]))]
    assert not torch.allclose(got, want, atol=1e-2)
    turned = each.model(inputs_embeds=table(ids).roll(1, 2), attention_mask=mask).logits
    close(got, turned, atol=1e-6)


def test_logits_of_the_last_columns(both):
    ids, mask = batch("left")
    whole = both.model(ids, attention_mask=mask).logits
    for keep in (2, 99, torch.tensor([1, 3])):
        kept = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        got = both.model(ids, attention_mask=mask, logits_to_keep=keep).logits
        assert torch.equal(got, whole[:, kept])


def test_hidden_states_at_every_block(each):
    ids, _ = batch(lengths=(6, 6))
    want = each.reference(input_ids=ids, output_hidden_states=True).hidden_states
    got = each.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        close(one, other)


def test_a_cache_of_ones_own_loop(both):
    ids, mask = batch("left")
    want = both.model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for end in (4, 5, 7):
        start = 0 if cache is None else cache.get_seq_length()
        new = both.model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache = new.past_key_values
        parts.append(new.logits)
    close(torch.cat(parts, 1), want, mask)
    cache.crop(-3)
    again = both.model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    close(again.logits, want[:, 4:], mask[:, 4:])
    cache.crop(4)  # as many as stay, in the words of older versions
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert repr(cache) == "RemoteCache(2 rows, 4 columns)"
    assert cache.batch_size == 2
    rows = both.model(ids[[2, 0], 4:], attention_mask=mask[[2, 0]], past_key_values=cache)
    close(rows.logits, want[[2, 0], 4:], mask[[2, 0], 4:])
    cache.crop(-3)
    cache.batch_repeat_interleave(1)
    with pytest.raises(UsageError, match="begun with 3"):
        cache.batch_repeat_interleave(2)
    cache.reset()
    whole = both.model(ids[:2], attention_mask=mask[:2], past_key_values=cache)
    close(whole.logits, want[:2], mask[:2])
    cache.close()
    with pytest.raises(UsageError, match="closed"):
        both.model(ids[:2], past_key_values=cache)


def test_rows_of_a_cache_are_chosen_and_repeated(both):
    ids, mask = batch("left", (7, 3, 5, 6))
    want = both.model(ids, attention_mask=mask).logits
    cache = both.model.new_cache()
    cache.reorder_cache(torch.tensor([0]))  # there are none yet
    assert (cache.batch_size, cache.mask) == (-1, None)
    both.model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    rows = [1, 1, 3, 3]
    got = both.model(ids[rows, 4:], attention_mask=mask[rows], past_key_values=cache)
    close(got.logits, want[rows, 4:], mask[rows, 4:])
    cache.crop(99)  # more than there are, in either meaning
    assert cache.get_seq_length() == 7
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    again = both.model(ids[rows], attention_mask=mask[rows], past_key_values=cache)
    close(again.logits, want[rows], mask[rows])


def test_rows_that_begin_alike_but_for_their_masks(each):
    ids = batch(lengths=(6,))[0].repeat(3, 1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    want = each.model(ids, attention_mask=mask).logits
    close(each.model(ids, attention_mask=mask, use_cache=True).logits, want, mask)


def test_no_more_is_sent_than_is_needed(both):
    """Of a prompt only the columns that are wanted come back; an order only where one is new."""
    ids, mask = batch("left", (7, 3))
    cache, sent = both.model.new_cache(), []
    both.model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    session = cache._session.value
    forward = session.chain.forward

    async def watched(segments, hidden, order):
        sent.append((segments, order))
        return await forward(segments, hidden, order)

    session.chain.forward = watched
    both.model(ids[:, 5:], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert sent == [([Segment(0, 5, 2, 1), Segment(1, 1, 2, 1)], [])]
    cache.reorder_cache(torch.tensor([1, 0]))
    for _ in range(2):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        both.model(ids[:, :1] + 5, attention_mask=mask[[1, 0]], past_key_values=cache)
    assert [order for _, order in sent[1:]] == [[1, 0], []]


def test_columns_of_a_cache_that_are_padding_alone(both):
    ids, mask = batch("left", (7, 3))
    want, cache = both.model(ids[1:], attention_mask=mask[1:]).logits, both.model.new_cache()
    parts = [
        both.model(ids[1:, a:b], attention_mask=mask[1:, :b], past_key_values=cache).logits
        for a, b in ((0, 2), (2, 5), (5, 7))
    ]
    close(torch.cat(parts, 1), want, mask[1:])


def test_under_autocast(each):
    ids, mask = batch("left")
    want = each.model(ids, attention_mask=mask).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for use_cache in (False, True):
            got = each.model(ids, attention_mask=mask, use_cache=use_cache).logits
            assert (got - want)[mask.bool()].norm() < 0.02 * want[mask.bool()].norm()


def test_a_cache_of_which_a_step_failed_is_of_no_more_use(both):
    ids, mask = batch("left")
    cache = both.model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    session = cache._session.value

    async def fails(*step):
        raise PeerGone("It died.")

    session.chain.forward, forward = fails, session.chain.forward
    with pytest.raises(PeerGone):
        both.model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    session.chain.forward = forward
    with pytest.raises(UsageError, match="interrupted"):
        both.model(ids[:, 4:], attention_mask=mask, past_key_values=cache)


def test_bad_inputs_are_said(both):
    ids, mask = batch()
    model = both.model
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    wrong = [
        {},
        {"input_ids": ids, "inputs_embeds": torch.zeros(1, 1, 4)},
        {"input_ids": ids[0]},
        {"input_ids": ids[:, :0]},
        {"input_ids": ids + 100_000},
        {"input_ids": ids.float()},
        {"input_ids": ids.bool()},
        {"input_ids": ids.tolist()},
        {"input_ids": ids, "attention_mask": mask.tolist()},
        {"inputs_embeds": torch.zeros(1, 3, 5)},
        {"inputs_embeds": torch.zeros(1, 3, 5), "use_cache": True},
        {"inputs_embeds": model.get_input_embeddings()(ids) / 0, "use_cache": True},
        {"inputs_embeds": ids[:, :, None]},
        {"input_ids": ids, "labels": ids[:1]},
        {"input_ids": ids, "labels": ids[0]},
        {"input_ids": ids, "labels": ids.tolist()},
        {"input_ids": ids, "labels": ids.float()},
        {"input_ids": ids, "labels": ids + 100_000},
        {"input_ids": ids, "labels": ids - 100_000},
        {"input_ids": ids, "labels": torch.full_like(ids, -1)},
        {"input_ids": ids, "labels": torch.full_like(ids, model.config.vocab_size)},
        {"input_ids": ids, "labels": ids, "logits_to_keep": 2},
        {"input_ids": ids, "attention_mask": mask[:, :3]},
        {"input_ids": ids, "attention_mask": mask[:, None, None]},
        {"input_ids": ids, "attention_mask": mask * 0},
        {"input_ids": ids, "position_ids": torch.arange(7)[None] + 3},
        {"input_ids": ids, "position_ids": torch.arange(3)[None]},
        {"input_ids": ids, "position_ids": torch.arange(7)},
        {"input_ids": ids, "position_ids": torch.arange(7).expand(2, 7)},
        {"input_ids": ids, "output_attentions": True},
        {"input_ids": ids, "past_key_values": object()},
        {"input_ids": ids, "use_cache": True, "output_hidden_states": True},
        {"input_ids": ids[:2], "past_key_values": cache},
        {"input_ids": ids, "past_key_values": cache, "attention_mask": torch.ones(3, 14)},
    ]
    for inputs in wrong:
        with pytest.raises(UsageError):
            model(**inputs)


def test_no_gradients_go_through_a_cache(both):
    ids, _ = batch(lengths=(6, 6))
    model = both.model
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    with pytest.raises(UsageError, match="no gradients through a cache"):
        model(inputs_embeds=embeddings, use_cache=True)
    with torch.no_grad():
        model(inputs_embeds=embeddings, use_cache=True)
    unfreeze(model.get_output_embeddings())  # behind the cache: nothing goes through it
    if model.get_input_embeddings() is not model.get_output_embeddings():
        model(ids, use_cache=True, labels=ids).loss.backward()
        assert model.get_output_embeddings().weight.grad.any()
    trained = model.enable_prompt(2)
    with pytest.raises(UsageError, match="no gradients through a cache"):
        model(ids, use_cache=True)
    trained.requires_grad_(False)
    freeze(model.local)
    assert model(ids, use_cache=True).logits.isfinite().all()
