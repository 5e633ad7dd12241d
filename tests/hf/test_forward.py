"""``forward``: logits, loss and hidden states are those of transformers on the same checkpoint."""

import pytest
import torch

from petalnode.errors import PeerGone, UsageError

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
    assert len(got) == len(want) == 2
    close(got[0], want[0])
    close(got[1], want[1])


def test_embeddings_instead_of_ids(each):
    ids, mask = batch()
    embeddings = each.model.get_input_embeddings()(ids)
    close(
        each.model(inputs_embeds=embeddings, attention_mask=mask).logits,
        each.model(ids, attention_mask=mask).logits,
        atol=1e-6,
    )


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
        {"input_ids": ids, "labels": ids, "logits_to_keep": 2},
        {"input_ids": ids, "attention_mask": mask[:, :3]},
        {"input_ids": ids, "attention_mask": mask[:, None, None]},
        {"input_ids": ids, "attention_mask": mask * 0},
        {"input_ids": ids, "position_ids": torch.arange(7)[None] + 3},
        {"input_ids": ids, "position_ids": torch.arange(3)[None]},
        {"input_ids": ids, "output_attentions": True},
        {"input_ids": ids, "past_key_values": object()},
        {"input_ids": ids, "use_cache": True, "output_hidden_states": True},
        {"input_ids": ids[:2], "past_key_values": cache},
        {"input_ids": ids, "past_key_values": cache, "attention_mask": torch.ones(3, 14)},
    ]
    for inputs in wrong:
        with pytest.raises(UsageError):
            model(**inputs)
    model.enable_prompt(2)
    with pytest.raises(UsageError, match="no gradients through a cache"):
        model(ids, use_cache=True)
