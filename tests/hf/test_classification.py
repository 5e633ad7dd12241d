"""Sequence classification through ``petalnode.hf``: scores and gradients are transformers' own."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from petalnode.errors import UsageError
from petalnode.hf import PetalnodeForSequenceClassification

from .swarm_node import model_on
from .test_forward import batch, close


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(each, side):
    model = model_on(each.node, PetalnodeForSequenceClassification, num_labels=3, pad_token_id=0)
    reference = AutoModelForSequenceClassification.from_pretrained(
        each.path,
        num_labels=3,
        pad_token_id=0,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    reference.score.weight.data = model.score.weight.detach().clone()
    ids, mask = batch(side, (7, 3, 5))
    labels = torch.tensor([0, 2, 1])
    got = model(ids, attention_mask=mask, labels=labels)
    want = reference(ids, attention_mask=mask, labels=labels)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    loss, logits = model(ids, attention_mask=mask, labels=labels, return_dict=False)
    assert torch.equal(logits, got.logits)
    assert loss == got.loss
    assert [name for name, _ in model.named_parameters()] == ["score.weight"]
    got.loss.backward()
    want.loss.backward()
    close(model.score.weight.grad, reference.score.weight.grad)


def test_without_a_mask_a_classifier_scores_the_last_that_is_not_padding(both):
    model = model_on(both.node, PetalnodeForSequenceClassification, num_labels=3, pad_token_id=0)
    ids, mask = batch("right", (7, 3, 5))
    close(model(ids).logits, model(ids, attention_mask=mask).logits)
    embeddings = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeddings, attention_mask=mask).logits, model(ids).logits)
    model.config.pad_token_id = 299  # the mask says more than what the tokens are
    close(model(ids, attention_mask=mask).logits[1:2], model(ids[1:2, :3]).logits)
    with pytest.raises(UsageError, match="Attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(UsageError, match="no cache"):
        model(ids, past_key_values=model.new_cache())


def test_labels_that_are_no_rows_classes_are_said(both):
    model = model_on(both.node, PetalnodeForSequenceClassification, num_labels=3, pad_token_id=0)
    ids, mask = batch("right", (7, 3, 5))
    for wrong in ([0, 1, 2], torch.tensor(1), torch.tensor([0, 1]), torch.tensor([0, 1, 3])):
        with pytest.raises(UsageError, match=r"[Ll]abel"):
            model(ids, attention_mask=mask, labels=wrong)
    with pytest.raises(UsageError, match="0 to 2"):
        model(ids, attention_mask=mask, labels=torch.tensor([0, -1, 1]))
    counted = model(ids[:2], attention_mask=mask[:2], labels=torch.tensor([0, 2])).loss
    close(model(ids, attention_mask=mask, labels=torch.tensor([0, 2, -100])).loss, counted)
    for kind, given in (
        ("regression", torch.rand(3, 1)),
        ("regression", torch.tensor([[7], [0], [9]])),  # numbers to come near, not classes
        ("multi_label_classification", torch.rand(3, 3)),
    ):
        settings = {"num_labels": given.shape[1], "problem_type": kind, "pad_token_id": 0}
        other = model_on(both.node, PetalnodeForSequenceClassification, **settings)
        assert other(ids, attention_mask=mask, labels=given).loss.isfinite()


def test_a_classifiers_score_is_saved(both, tmp_path):
    model = model_on(both.node, PetalnodeForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    fresh = model_on(both.node, PetalnodeForSequenceClassification, num_labels=3)
    fresh.load_trained(tmp_path)
    assert torch.equal(fresh.score.weight, model.score.weight)
    ids, mask = batch("left", (4, 4))
    assert torch.equal(fresh(ids, attention_mask=mask).logits, model(ids, attention_mask=mask)[0])
    with pytest.raises(UsageError, match="padding"):
        model(ids)
    with pytest.raises(UsageError, match="not this model's"):
        model_on(both.node, PetalnodeForSequenceClassification, num_labels=2).load_trained(tmp_path)


def test_a_score_begins_small_and_at_random(both):
    settings = {"num_labels": 40, "initializer_range": 0.5}
    torch.manual_seed(3)
    one = model_on(both.node, PetalnodeForSequenceClassification, **settings).score.weight
    other = model_on(both.node, PetalnodeForSequenceClassification, **settings).score.weight
    assert 0.45 < float(one.detach().std()) < 0.55
    assert not torch.equal(one, other)


def test_rows_whose_padding_nobody_need_name(both):
    model = model_on(both.node, PetalnodeForSequenceClassification, num_labels=3)
    assert model.config.pad_token_id is None
    ids, mask = batch("left", (4, 4))
    want = model(ids, attention_mask=mask, output_hidden_states=True)
    close(model(ids[:1]).logits, want.logits[:1])
    embeddings = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeddings).logits, want.logits)
    model.config.pad_token_id = 0
    close(model(inputs_embeds=embeddings).logits, want.logits)
    states = both.reference(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(want.hidden_states)
    for one, other in zip(want.hidden_states, states, strict=True):
        close(one, other)
