"""Training through ``petalnode.hf``: losses and gradients are those of transformers' own model."""

from contextlib import contextmanager

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.hf import freeze, unfreeze
from petalnode.routing.costs import Workload
from petalnode.training.modules import TrainedParameters

from .swarm_node import model_on
from .test_forward import batch, close
from .test_generate import generate

TARGETS = {"llama": ["q_proj", "down_proj"], "bloom": ["query_key_value", "dense_4h_to_h"]}


def layers(reference):
    inner = getattr(reference.base_model, "decoder", reference.base_model)
    return inner.layers if hasattr(inner, "layers") else inner.h


@contextmanager
def adapted(reference, trained):
    """transformers' model with the same matrices and prompts, which get gradients."""
    own = {name: one.detach().clone().requires_grad_() for name, one in trained.named_parameters()}
    hooks = []

    def low_rank(name, scale):
        def add(module, args, output):
            return output + scale * (args[0] @ own[f"{name}.a"].T) @ own[f"{name}.b"].T

        return add

    def prompt(name, first):
        def add(module, args, kwargs):
            hidden, n = args[0], len(own[name])
            if hidden.shape[1] > 1:  # later steps have no position of the prompt
                before = hidden[:, :n] * first + own[name]
                hidden = torch.cat([before, hidden[:, n:]], 1)
            return (hidden, *args[1:]), kwargs

        return add

    if trained.prompt is not None:  # instead of what is made of the embeddings there
        hook = prompt("soft", 0.0)
        hooks.append(layers(reference)[0].register_forward_pre_hook(hook, with_kwargs=True))
    for index, block in trained.tuning().blocks.items():
        layer = layers(reference)[index]
        for site, low in block.lora.items():
            hook = low_rank(f"{index}.{site}", low.scale)
            hooks.append(layer.get_submodule(site).register_forward_hook(hook))
        if block.prompt is not None:
            hook = prompt(f"{index}.prompt", 1.0)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield own
    finally:
        for hook in hooks:
            hook.remove()


def reference_inputs(reference, own, ids, mask):
    """Embeddings with room for the prompt before them, and the mask for both."""
    embeddings = reference.get_input_embeddings()(ids)
    if "soft" not in own:
        return embeddings, mask
    n = len(own["soft"])
    room = embeddings[:, :1].detach().expand(-1, n, -1)
    return torch.cat([room, embeddings], 1), torch.cat([mask.new_ones(len(ids), n), mask], 1)


def reference_loss(reference, own, ids, mask):
    embeddings, longer = reference_inputs(reference, own, ids, mask)
    logits = reference(inputs_embeds=embeddings, attention_mask=longer).logits
    logits = logits[:, longer.shape[1] - ids.shape[1] :]
    labels = ids.masked_fill(mask == 0, -100)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def enable(both, kind):
    """What is trained, with numbers that are not zero."""
    if kind == "lora":
        targets = TARGETS.get(both.reference.config.model_type)
        trained = both.model.enable_lora(4, 8, targets, seed=3)
    else:
        trained = both.model.enable_prompt(3, deep=kind == "deep prompt")
    rng = torch.Generator().manual_seed(4)
    for parameter in trained.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    return trained


KINDS = ["lora", "prompt", "deep prompt"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(each, kind):
    ids, mask = batch("right", (9, 2, 6))
    trained = enable(each, kind)
    loss = each.model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    with adapted(each.reference, trained) as own:
        want = reference_loss(each.reference, own, ids, mask)
        want.backward()
    close(loss, want)
    assert {name for name, _ in trained.named_parameters()} == set(own)
    for name, parameter in trained.named_parameters():
        error = (parameter.grad - own[name].grad).norm() / own[name].grad.norm()
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_with_what_is_trained(both, kind):
    ids, mask = batch("right", (7, 4))
    trained = enable(both, kind)
    got = both.model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
    with adapted(both.reference, trained) as own:
        embeddings, longer = reference_inputs(both.reference, own, ids, mask)
        want = both.reference(
            inputs_embeds=embeddings, attention_mask=longer, output_hidden_states=True
        ).hidden_states
    assert len(got.hidden_states) == len(want)
    for one, other in zip(got.hidden_states, want, strict=True):
        close(one, other[:, -ids.shape[1] :], mask)
    got.hidden_states[-1].sum().backward()
    assert all(one.grad.any() for one in trained.parameters())


def test_what_is_said_of_matrices_and_prompts(both):
    lora = both.model.enable_lora(4, alpha=2.0, seed=1)
    (scale,) = {low.scale for one in lora.tuning().blocks.values() for low in one.lora.values()}
    assert scale == 2.0 / 4
    first = next(lora.parameters()).detach().clone()
    for seed, same in ((1, True), (2, False)):
        both.model.disable()
        again = next(both.model.enable_lora(4, seed=seed).parameters())
        assert torch.equal(again, first) is same
    prompts = []
    for seed in (1, 1, 2):
        both.model.disable()
        prompts.append(both.model.enable_prompt(2, seed=seed).prompt)
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_steps_of_an_ordinary_loop(both):
    trained = enable(both, "lora")
    optimizer, losses = torch.optim.AdamW(both.model.parameters(), lr=1e-2), []
    with adapted(both.reference, trained) as own:
        local = torch.optim.AdamW(own.values(), lr=1e-2)
        for step in range(6):
            ids, mask = batch("left", (9, 2, 6), seed=step % 2)
            loss = both.model(ids, attention_mask=mask, labels=ids).loss
            labels = ids.masked_fill(mask.cumsum(1) * mask < 2, -100)
            want = both.reference(ids, attention_mask=mask, labels=labels).loss
            close(loss, want)
            losses.append(float(loss.detach()))
            for one, its in ((optimizer, loss), (local, want)):
                one.zero_grad()
                its.backward()
                one.step()
    assert losses[4] < losses[0] - 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_what_is_trained(both, kind, beams):
    ids, mask = batch(lengths=(7, 7))
    trained = enable(both, kind)
    options = {"do_sample": False, "num_beams": beams, "eos_token_id": None}
    got = generate(both.model, ids, mask, **options)
    with torch.no_grad(), adapted(both.reference, trained) as own:
        embeddings, longer = reference_inputs(both.reference, own, ids, mask)
        want = both.reference.generate(
            inputs_embeds=embeddings,
            attention_mask=longer,
            max_new_tokens=12,
            pad_token_id=0,
            **options,
        )
    assert got[:, ids.shape[1] :].tolist() == want.tolist()
    both.model.disable()
    assert generate(both.model, ids, mask, **options).tolist() != got.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_begins_again_after_reset(each, kind):
    """With the prompt, which lies before each row once more: rows of other lengths fit too."""
    ids, mask = batch("left", (7, 3))
    more, longer = batch("left", (4, 9), seed=1)
    enable(each, kind)
    with torch.no_grad():
        want = each.model(more, attention_mask=longer).logits
        cache = each.model.new_cache()
        each.model(ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        parts = [
            each.model(
                more[:, start:end], attention_mask=longer[:, :end], past_key_values=cache
            ).logits
            for start, end in ((0, 6), (6, 9))
        ]
    close(torch.cat(parts, 1), want, longer)


def test_what_is_fed_first_is_asked_of_the_hops(both):
    ids, mask = batch("left", (7, 3))
    with torch.no_grad():
        both.model(ids, attention_mask=mask, use_cache=True)
        assert both.node.value.asked == Workload(kv_tokens=7 + 3, context=7)
        enable(both, "prompt")
        both.model(ids, attention_mask=mask, use_cache=True)
    assert both.node.value.asked == Workload(kv_tokens=3 + 7 + 3 + 3, context=3 + 7)


def test_a_prompt_of_another_model_is_not_enabled(both):
    for prompt in (torch.zeros(3, 5), torch.zeros(64), torch.zeros(2048, 64)):
        with pytest.raises(UsageError, match="prompt"):
            both.model.enable(TrainedParameters(prompt=prompt))
    assert list(both.model.parameters()) == []


def test_a_prompt_of_numbers_that_are_none_generates_nothing(both):
    enable(both, "prompt").prompt.data[0, 0] = float("nan")
    ids, mask = batch(lengths=(4, 4))
    with pytest.raises(UsageError, match="not finite"):
        generate(both.model, ids, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_on_with_what_it_was_made_with(each, kind):
    ids, _ = batch(lengths=(7,))
    trained = enable(each, kind)
    with torch.no_grad():
        want = each.model(ids).logits
        cache = each.model.new_cache()
        each.model(ids[:, :3], past_key_values=cache)
        for parameter in trained.parameters():
            parameter.data.zero_()
        each.model.disable()
        close(each.model(ids[:, 3:], past_key_values=cache).logits, want[:, 3:])


def test_parameters_are_what_is_trained_and_nothing_else(both):
    model = both.model
    assert list(model.parameters()) == []
    assert model.num_parameters() == 0
    assert "blocks on other machines, frozen" in repr(model)
    model.enable_lora()
    assert all(name.startswith("trained.") for name, _ in model.named_parameters())
    unfreeze(model.get_output_embeddings())
    others = [name for name, _ in model.named_parameters() if not name.startswith("trained.")]
    assert len(others) == 1
    freeze(model.local)
    assert len(list(model.parameters())) == len(list(model.trained.parameters()))
    with pytest.raises(UsageError, match="already"):
        model.enable_prompt()
    with pytest.raises(UsageError, match="local"):
        unfreeze(model.blocks)


def test_gradients_of_local_modules_that_were_unfrozen(each):
    ids, mask = batch("right", (9, 2, 6))
    unfreeze(each.model.local)
    labels = ids.masked_fill(mask == 0, -100)
    each.model(ids, attention_mask=mask, labels=labels).loss.backward()
    each.reference(ids, attention_mask=mask, labels=labels).loss.backward()
    ends = [
        (each.model.get_input_embeddings(), each.reference.get_input_embeddings()),
        (each.model.get_output_embeddings(), each.reference.get_output_embeddings()),
    ]
    if "norm" in each.model.local:
        ends.append((each.model.local["norm"], each.reference.base_model.norm))
    for own, other in ends:
        error = (own.weight.grad - other.weight.grad).norm() / other.weight.grad.norm()
        assert error < 1e-4, own


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_saved_and_loaded(both, kind, tmp_path):
    ids, mask = batch()
    enable(both, kind)
    unfreeze(both.model.get_output_embeddings())
    head = both.model.get_output_embeddings().weight
    head.data = (head.data * 1.5).T.contiguous().T  # in another order of memory
    want = both.model(ids, attention_mask=mask).logits
    both.model.save_pretrained(tmp_path / "a" / "new one")
    found = {file.name for file in (tmp_path / "a" / "new one").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert found == adapter | {"local_modules.safetensors"}
    fresh = model_on(both.node)
    fresh.load_trained(tmp_path / "a" / "new one")
    close(fresh(ids, attention_mask=mask).logits, want, atol=1e-6)
    names = {name for name, _ in both.model.named_parameters()}
    assert {name for name, _ in fresh.named_parameters()} == names


def test_peft_loads_what_was_saved(both, tmp_path):
    from peft import PeftModel

    ids, mask = batch()
    enable(both, "lora")
    both.model.save_pretrained(tmp_path)
    want = both.model(ids, attention_mask=mask).logits
    assert not (tmp_path / "local_modules.safetensors").exists()
    theirs = PeftModel.from_pretrained(both.reference, tmp_path)
    try:
        close(theirs(ids, attention_mask=mask).logits, want, mask)
    finally:
        theirs.unload()


def test_what_peft_made_is_loaded(both, tmp_path):
    from peft import LoraConfig, get_peft_model

    ids, mask = batch()
    targets = TARGETS[both.reference.config.model_type]
    torch.manual_seed(5)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(both.reference, config)
    try:
        theirs.save_pretrained(tmp_path)
        want = theirs(ids, attention_mask=mask).logits
        both.model.load_trained(tmp_path)
        close(both.model(ids, attention_mask=mask).logits, want, mask)
        assert not torch.allclose(model_on(both.node)(ids).logits, want, atol=1e-2)
    finally:
        theirs.unload()


def test_files_that_are_not_this_models_are_said(both, nodes, tmp_path):
    with pytest.raises(UsageError, match="Nothing is trained"):
        both.model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="neither"):
        both.model.load_trained(tmp_path)
    with pytest.raises(UsageError, match="no adapter"):
        both.model.load_trained(tmp_path / "not there")
    (tmp_path / "a file").write_text("mine")
    both.model.enable_lora(2)
    with pytest.raises(UsageError, match="is a file"):
        both.model.save_pretrained(tmp_path / "a file")
    both.model.disable()
    (tmp_path / "local_modules.safetensors").write_bytes(b"12345678 what is this?")
    with pytest.raises(UsageError, match="damaged"):
        both.model.load_trained(tmp_path)
    unfreeze(both.model.get_output_embeddings())
    both.model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="uploads nothing"):
        both.model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()
    other = model_on(nodes("opt")[1])
    with pytest.raises(UsageError, match="not this model's"):
        other.load_trained(tmp_path)
    both.model.enable_lora()
    both.model.save_pretrained(tmp_path)
    fresh = model_on(both.node)
    (tmp_path / "local_modules.safetensors").write_bytes(b"12345678 what is this?")
    with pytest.raises(UsageError, match="damaged"):
        fresh.load_trained(tmp_path)
    assert list(fresh.parameters()) == list(other.parameters()) == []
