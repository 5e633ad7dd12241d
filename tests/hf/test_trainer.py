"""``Trainer`` of transformers over ``petalnode.hf``: what it computes, saves and goes on from."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from petalnode.hf import PetalnodeForSequenceClassification, unfreeze

from .swarm_node import model_on
from .test_forward import batch, close
from .test_training import KINDS, enable


def rows_of(side="right", labels=None):
    """Rows of unequal length, as a data set has them."""
    ids, mask = batch(side, (9, 2, 6, 5))
    labels = ids.masked_fill(mask == 0, -100) if labels is None else labels
    return [
        {"input_ids": row, "attention_mask": kept, "labels": label}
        for row, kept, label in zip(ids, mask, labels, strict=True)
    ]


def make_trainer(model, directory, rows, **changes):
    arguments = {"per_device_train_batch_size": 2, "learning_rate": 1e-2} | changes
    settings = TrainingArguments(
        output_dir=str(directory),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)


def train(model, directory, *, resume=None, rows=None, **changes):
    """Let it train; return the loss of each step, and the trainer."""
    trainer = make_trainer(model, directory, rows or rows_of(), **changes)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_trained_is_trained_and_saved(both, kind, tmp_path):
    trained = enable(both, kind)
    before = {name: one.detach().clone() for name, one in trained.named_parameters()}
    _, trainer = train(both.model, tmp_path, max_steps=3, save_strategy="no")
    for name, one in trained.named_parameters():
        assert not torch.equal(one, before[name]), name
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    fresh = model_on(both.node)
    fresh.load_trained(tmp_path / "out")
    for name, one in fresh.trained.named_parameters():
        assert torch.equal(one, trained.get_parameter(name)), name
    assert trainer.predict(rows_of()).predictions.shape == (4, 9, both.model.config.vocab_size)


def causal(both):
    model = model_on(both.node)
    model.enable_lora(4)
    return model, rows_of()


def classifier(both):
    torch.manual_seed(0)
    settings = {"num_labels": 3, "pad_token_id": 0}
    model = model_on(both.node, PetalnodeForSequenceClassification, **settings)
    return model, rows_of(labels=torch.tensor([0, 2, 1, 2]))


@pytest.mark.parametrize("make", [causal, classifier])
def test_accumulated_losses_are_those_of_a_larger_batch(both, make, tmp_path):
    steps = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    found = []
    for size in (4, 2, 1):
        model, rows = make(both)
        parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        losses, _ = train(model, tmp_path, rows=rows, **steps, **parts)
        found.append([*losses, *(float(one.detach().norm()) for one in model.parameters())])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


def test_labels_are_shifted_where_they_are_smoothed(both, tmp_path):
    """``Trainer`` computes this loss by itself, from the logits."""
    losses = []
    for model in (both.model, both.reference):
        trainer = make_trainer(model, tmp_path, rows_of(), label_smoothing_factor=0.1)
        inputs = trainer.data_collator(rows_of())
        losses.append(trainer.compute_loss(model, inputs))
    close(*losses)


def test_noise_on_embeddings(both, tmp_path):
    both.model.enable_lora(4)
    plain = {"max_steps": 1, "save_strategy": "no"}
    without, _ = train(both.model, tmp_path, **plain, learning_rate=0.0)
    noisy, _ = train(both.model, tmp_path, **plain, neftune_noise_alpha=5)
    assert abs(noisy[0] - without[0]) > 1e-3


def test_the_trainer_goes_on_from_a_checkpoint_and_takes_the_best(both, tmp_path):
    def fresh():
        model = model_on(both.node)
        model.enable_lora(4)
        unfreeze(model.local["norm" if "norm" in model.local else "ln_f"])
        return model

    often = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    losses, _ = train(fresh(), tmp_path, **often)
    resumed, _ = train(fresh(), tmp_path, resume=str(tmp_path / "checkpoint-2"), **often)
    assert resumed == pytest.approx(losses, abs=1e-4)
    assert abs(losses[3] - losses[1]) > 1e-2
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    model = fresh()
    _, trainer = train(model, tmp_path / "best", **often, **best)
    loaded = model_on(both.node)
    loaded.load_trained(trainer.state.best_model_checkpoint)
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
