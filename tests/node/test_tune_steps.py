"""Optimizer steps: losses and gradients as transformers and autograd have them."""

import math

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.training import loss as losses
from petalnode.training.loss import make_batch
from petalnode.training.tuner import (
    METHODS,
    StepFailed,
    TuneOptions,
    Tuner,
    check_options,
    new_parameters,
    targets_of,
)
from petalnode.training.tuning_run import longest_row

from .tuning_jobs import job_of, row, rows_of_batch, run, training

__all__ = ["training"]


def tuner_of(training, **changes):
    job = job_of(training, **changes)
    config = training.checkpoint.config
    parameters = new_parameters(job.options, config, training.client, job.data.rows)
    return Tuner(training, training.client, training.compute, job.options, parameters)


def reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)


async def test_the_loss_before_training_is_that_of_transformers(training, tiny_checkpoint):
    job, tuner = job_of(training), tuner_of(training)
    model, total, count = reference(tiny_checkpoint()), 0.0, 0
    for one in job.data.rows:
        ids = torch.tensor([one.ids])
        labels = torch.where(torch.tensor([list(one.learned)]) == 1, ids, -100)
        total += float(model(ids, labels=labels).loss) * sum(one.learned)
        count += sum(one.learned)
    assert await tuner.evaluate(job.data.rows) == pytest.approx(total / count, rel=1e-5)


async def test_soft_prompts_train_as_with_transformers_and_torch(training, tiny_checkpoint):
    """Five steps of AdamW on a prompt before the embeddings, by padded rows and autograd."""
    job = job_of(training, method="prompt", steps=5)
    log = await run(job, training)

    model, options = reference(tiny_checkpoint()), job.options
    start = new_parameters(
        options, training.checkpoint.config, training.client, job.data.rows
    ).prompt
    prompt = torch.nn.Parameter(start.detach().clone())
    optimizer = torch.optim.AdamW([prompt], lr=1.0, weight_decay=0.01)
    rates = [options.rate_at(step) for step in range(options.steps)]
    assert rates == pytest.approx([0.02, 0.016, 0.012, 0.008, 0.004])
    for step, rate in enumerate(rates):
        chosen = rows_of_batch(job, step)
        total = sum(prompted_loss(model, prompt, one) for one in chosen)
        mean = total / sum(sum(one.learned) for one in chosen)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert log.losses[step] == pytest.approx(float(mean.detach()), rel=1e-5)


async def test_the_gradient_is_that_of_autograd(training, tiny_checkpoint):
    """AdamW and the clipping hide a wrong factor: so here are the numbers themselves."""
    job = job_of(training, method="prompt")
    start = new_parameters(
        job.options, training.checkpoint.config, training.client, job.data.rows
    ).prompt
    batch = make_batch(job.data.rows, len(start))
    output, record = await training.forward(batch.hidden(training.client, start), batch.lengths)
    loss, grad = losses.mean_loss_and_gradient(training.client, batch, output)
    grad_in, _ = await training.backward(record, grad)

    model, prompt = reference(tiny_checkpoint()), start.detach().clone().requires_grad_()
    count = sum(sum(one.learned) for one in job.data.rows)
    expected = sum(prompted_loss(model, prompt, one) for one in job.data.rows) / count
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    error = (batch.prompt_gradient(grad_in) - prompt.grad).norm() / prompt.grad.norm()
    assert float(error) < 1e-4


def test_positions_go_on_behind_the_prompt():
    batch = make_batch([row([7, 8, 9]), row([7, 8])], prompt_tokens=4)
    assert batch.positions_N.tolist() == [4, 5, 4]
    assert batch.text_N.tolist() == [4, 5, 10]
    assert batch.prompt.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert (batch.lengths, batch.targets_L.tolist()) == ([6, 5], [8, 9, 8])
    assert batch.learned_L.tolist() == [4, 5, 10]


def prompted_loss(model, prompt, one):
    ids = torch.tensor(one.ids)
    hidden = torch.cat([prompt, model.get_input_embeddings()(ids)])
    logits = model(inputs_embeds=hidden[None]).logits[0, len(prompt) - 1 : -1]
    learned = torch.tensor(list(one.learned)) == 1
    return torch.nn.functional.cross_entropy(logits[learned], ids[learned], reduction="sum")


@pytest.mark.parametrize("method", METHODS)
async def test_training_lowers_the_loss_and_weights_stay(training, method):
    before = {
        name: tensor.clone()
        for name, tensor in training.checkpoint.tensors(training.checkpoint._weight_map)
    }
    log = await run(job_of(training, method=method, steps=25, learning_rate=0.05), training)
    assert sum(log.losses[-5:]) < sum(log.losses[:5]) - 0.5
    fresh = await run(job_of(training, method=method, steps=1), training)
    assert fresh.losses[0] == log.losses[0]
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in training.checkpoint.tensors(list(before))
    )


async def test_an_infinite_gradient_is_not_learned_from(training):
    real = training.backward

    async def broken(record, grad):
        grad_in, grads = await real(record, grad)
        return grad_in, {name: tensor * math.inf for name, tensor in grads.items()}

    training.backward = broken
    job, tuner = job_of(training), tuner_of(training)
    before = tuner.state()
    with pytest.raises(StepFailed, match="gradient of step 1 is nan"):
        await tuner.step(job.data.rows[:2])
    assert tuner.done == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tuner.state().items())


async def test_gradients_longer_than_one_are_shortened_to_one(training):
    real = training.backward

    async def steep(record, grad):
        grad_in, grads = await real(record, grad)
        return grad_in, {name: tensor * 1e4 for name, tensor in grads.items()}

    training.backward = steep
    job, tuner = job_of(training), tuner_of(training)
    await tuner.step(job.data.rows[:2])
    means = [mean for name, mean in tuner.state().items() if name.startswith("exp_avg.")]
    length = math.sqrt(sum(float(mean.square().sum()) for mean in means))
    assert length == pytest.approx(0.1, rel=1e-4)  # AdamW's first mean is a tenth of the gradient


async def test_a_validation_loss_that_is_no_number_is_none(training, monkeypatch):
    monkeypatch.setattr("petalnode.training.tuner.summed_loss", lambda *_: math.inf)
    with pytest.raises(StepFailed, match="validation loss after step 0 is inf"):
        await tuner_of(training).evaluate(job_of(training).data.rows)


async def test_hops_are_told_that_nothing_goes_back_after_a_validation(training, monkeypatch):
    real, told = training.forward, []

    async def forward(*arguments, backward=True, **keywords):
        told.append(backward)
        return await real(*arguments, backward=backward, **keywords)

    monkeypatch.setattr(training, "forward", forward)
    tuner, rows = tuner_of(training), job_of(training).data.rows[:2]
    await tuner.evaluate(rows)
    await tuner.step(rows)
    assert told == [False, True]


async def test_a_step_is_undone_unless_a_loss_after_it_was_finite(training):
    rows, tuner = job_of(training).data.rows, tuner_of(training)
    tuner.step_back()
    before, first = tuner.state(), await tuner.step(rows)
    tuner.step_back()
    assert tuner.done == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tuner.state().items())

    assert await tuner.step(rows) == first
    await tuner.evaluate(rows)
    tuner.step_back()
    assert tuner.done == 1

    await tuner.step(rows)
    training.before = {"forward": None}.__getitem__
    with pytest.raises(KeyError, match="backward"):
        await tuner.step(rows)
    tuner.step_back()
    assert tuner.done == 2


@pytest.mark.parametrize("method", ["prompt", "deep-prompt"])
def test_prompts_begin_as_tokens_of_many_rows(training, method):
    rows = [row([3 * n, 3 * n + 1, 3 * n + 2]) for n in range(1, 9)]
    options = TuneOptions(method=method, prompt_tokens=32)
    prompt = new_parameters(options, training.checkpoint.config, training.client, rows).prompt
    table = training.client.embed_trainable(torch.arange(27), torch.arange(27)).float()
    places = [int((table - vector).abs().sum(1).argmin()) for vector in prompt.detach()]
    assert torch.equal(table[places], prompt.detach())
    assert len({place // 3 for place in places}) > 4
    assert {place % 3 for place in places} == {0, 1, 2}


@pytest.mark.parametrize(
    ("method", "rate"), [("prompt", 0.03), ("deep-prompt", 0.01), ("lora", 0.001)]
)
def test_each_method_has_a_learning_rate_where_none_is_asked_for(method, rate):
    assert TuneOptions(method=method).rate == rate


@pytest.mark.parametrize(
    "bad",
    [
        *({"method": "full"}, {"steps": 0}, {"rank": 0}, {"learning_rate": math.nan}),
        *({"learning_rate": 0.0}, {"learning_rate": -1.0}, {"learning_rate": math.inf}),
        *({"seed": -1}, {"seed": 1 << 63}, {"batch_size": 1 << 17}),
        {"method": "prompt", "targets": ("q_proj",)},
    ],
)
def test_options_that_cannot_be(bad):
    with pytest.raises(UsageError):
        TuneOptions(**bad)


def test_options_that_the_model_cannot_have(training):
    config = training.checkpoint.config
    with pytest.raises(UsageError, match="q_porj"):
        check_options(TuneOptions(targets=("q_porj",)), config)
    with pytest.raises(UsageError, match="rank"):
        check_options(TuneOptions(rank=5000), config)
    with pytest.raises(UsageError, match="no room"):
        longest_row(config, TuneOptions(method="prompt", prompt_tokens=2047))
    assert longest_row(config, TuneOptions(method="prompt", prompt_tokens=16)) == 2032


def test_lora_adapts_queries_and_values_by_twice_the_rank_where_nothing_is_asked_for(training):
    assert targets_of(TuneOptions(), training.checkpoint.config) == ["q_proj", "v_proj"]
    parameters = new_parameters(
        TuneOptions(rank=4), training.checkpoint.config, training.client, []
    )
    lora = parameters.tuning().blocks[0].lora
    assert {site.rpartition(".")[2] for site in lora} == {"q_proj", "v_proj"}
    assert {low_rank.scale for low_rank in lora.values()} == {2.0}


def test_the_learning_rate_rises_and_falls():
    rates = [TuneOptions(steps=40, learning_rate=1.0).rate_at(step) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 36)
    assert TuneOptions(steps=1, learning_rate=1.0).rate_at(0) == 1.0


async def test_large_vocabularies_are_gone_through_in_pieces(training, monkeypatch):
    job = job_of(training)
    whole = await run(job, training)
    monkeypatch.setattr(losses, "MAX_LOGITS", 384 * 3)
    pieces = await run(job, training)
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-5)
