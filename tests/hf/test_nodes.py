"""``petalnode.hf`` over real nodes: opened, shared, closed; and what importing it takes."""

import ast
import gc
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trio

import petalnode
from petalnode.blocking import open_blocking
from petalnode.errors import UsageError
from petalnode.events import Waiting
from petalnode.hf import (
    PetalnodeForCausalLM,
    PetalnodeForSequenceClassification,
    freeze,
    unfreeze,
)
from petalnode.options import NodeOptions

from ..models.reference import load_reference
from .test_forward import batch, close
from .test_generate import generate


@pytest.fixture
def path(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tiny_checkpoint()


def loops():
    """How many nodes run in the background, those of other tests' fixtures too."""
    return sum(thread.name == "petalnode loop" for thread in threading.enumerate())


def serving(*blocks, join=()):
    return NodeOptions(host="127.0.0.1", blocks=blocks, join=join, dtype="float32")


def test_train_and_generate_through_two_other_nodes(path):
    before, reference = loops(), load_reference(path)
    ids, mask = batch("left", (7, 3))
    with (
        open_blocking(str(path), serving(0, 2)) as first,
        open_blocking(str(path), serving(2, 4, join=(first.value.invite,))),
        PetalnodeForCausalLM.from_pretrained(str(path), join=first.value.invite) as model,
    ):
        assert generate(model, ids, mask).tolist() == generate(reference, ids, mask).tolist()
        lora = model.enable_lora(4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(ids, attention_mask=mask, labels=ids).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert len(states) == 5
        assert all(one.grad is not None for one in lora.parameters())
        assert generate(model, ids, mask).shape[0] == 2
    assert loops() == before


def test_training_holds_no_tables_beside_the_models_own(path, monkeypatch):
    """A node's own embeddings and head are for its sessions; a model has them as modules."""

    def never(*_, **__):
        raise AssertionError("loaded a second time")

    ids, mask = batch()
    monkeypatch.setattr("petalnode.node.load_client", never)
    with PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4)) as model:
        model.enable_lora(2)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        assert generate(model, ids[:1], mask[:1]).shape[0] == 1


def save_lora(path, directory):
    """Save an adapter that changes much; return the logits of a batch and a text with it."""
    ids, mask = batch("left", (7, 3))
    with PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4)) as model:
        for parameter in model.enable_lora(2).parameters():
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(directory)
        return model(ids, attention_mask=mask).logits, generate(model, ids, mask)


def test_an_adapter_that_nodes_offer(path, tmp_path):
    ids, mask = batch("left", (7, 3))
    logits, text = save_lora(path, tmp_path / "law")
    options = NodeOptions(
        host="127.0.0.1", blocks=(0, 4), dtype="float32", adapters=(str(tmp_path / "law"),)
    )
    with open_blocking(str(path), options) as node:
        model = PetalnodeForCausalLM.from_pretrained(str(path), node=node, adapter="law")
        close(model(ids, attention_mask=mask).logits, logits, mask)
        assert generate(model, ids, mask).tolist() == text.tolist()
        assert list(model.parameters()) == []
        for enable in (model.enable_lora, lambda: model.use_adapter("law")):
            with pytest.raises(UsageError, match="already"):
                enable()
        with pytest.raises(UsageError, match="neither gradients nor"):
            model(ids, attention_mask=mask, output_hidden_states=True)
        unfreeze(model.get_input_embeddings())
        with pytest.raises(UsageError, match="neither gradients nor"):
            model(ids, attention_mask=mask)
        with torch.no_grad():
            close(model(ids, attention_mask=mask).logits, logits, mask)
        freeze(model.local)
        unfreeze(model.get_output_embeddings())  # behind the blocks: nothing goes through them
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        assert model.get_output_embeddings().weight.grad.any()
        model.disable()
        assert not torch.allclose(model(ids, attention_mask=mask).logits, logits, atol=1e-2)
        with pytest.raises(UsageError, match="no node offers"):
            model.use_adapter("medicine")
        model.use_adapter(str(tmp_path / "law"))  # a directory: the client's own
        assert len(list(model.trained.parameters())) > 0
        close(model(ids, attention_mask=mask).logits, logits, mask)


def test_a_model_that_was_closed_says_so(path):
    (ids, mask), running = batch("left"), loops()
    model = PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4))
    lora, before = model.enable_lora(2), model(ids, attention_mask=mask, labels=ids).loss
    cache = model.new_cache()
    model.close()
    assert loops() == running
    model.close()
    calls = (
        lambda: model(ids),
        before.backward,
        lambda: generate(model, ids, mask),
        lambda: generate(model, ids, mask, past_key_values=cache),
    )
    for call in calls:
        with pytest.raises(UsageError, match="closed"):
            call()
    assert len(model.state_dict()) == 3 + len(list(lora.parameters()))


def test_several_models_on_one_node(path):
    ids, mask = batch()
    with open_blocking(str(path), serving(0, 4)) as node:
        one = PetalnodeForCausalLM.from_pretrained(str(path), node=node)
        two = PetalnodeForSequenceClassification.from_pretrained(
            str(path), node=node, num_labels=5, pad_token_id=0
        )
        two.enable_prompt(2, deep=True)
        close(one(ids, attention_mask=mask).logits, load_reference(path)(ids, mask).logits, mask)
        assert two(ids, attention_mask=mask).logits.shape == (3, 5)
        one.close()
        assert two(ids, attention_mask=mask).logits.shape == (3, 5)


def test_a_prompt_that_begins_with_a_text(path):
    with PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4)) as model:
        text = torch.tensor([5, 6, 7])
        prompt = model.enable_prompt(text=text).prompt
        assert torch.equal(prompt, model.get_input_embeddings()(text))
        for wrong in (text[None], text[:0], [5, 6]):
            with pytest.raises(UsageError, match="no row of tokens"):
                model.enable_prompt(text=wrong)
        ids, _ = batch(lengths=(6,))
        with_text = torch.cat([text[None], ids], 1)
        close(model(ids).logits, load_reference(path)(with_text).logits[:, 3:])


def test_what_cannot_be_opened_is_said_and_nothing_stays(path, tmp_path):
    before = loops()
    options = serving(0, 4)
    for wrong in (
        {"join": "pn1:x", "options": options},
        {"options": options, "nothing_like_this": 3},
        {"options": options, "dtype": torch.bfloat16},
        {"options": options, "num_hidden_layers": 2},
        {"options": options, "trained": tmp_path},
    ):
        with pytest.raises(UsageError):
            PetalnodeForCausalLM.from_pretrained(str(path), **wrong)
    assert loops() == before


def test_a_node_of_ones_own_stays_open_whatever_fails(path, tmp_path):
    ids, mask = batch()
    with open_blocking(str(path), serving(0, 4)) as node:
        with pytest.raises(UsageError, match="neither"):
            PetalnodeForCausalLM.from_pretrained(str(path), node=node, trained=tmp_path)
        model = PetalnodeForCausalLM.from_pretrained(str(path), node=node)
        assert model(ids, attention_mask=mask).logits.isfinite().all()
        assert (model.name_or_path, model.training) == (str(path), False)


def test_a_model_that_nobody_refers_to_closes_its_node(path):
    model = PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4))
    thread = model.node._thread
    del model
    gc.collect()
    thread._thread.join(timeout=30)
    assert not thread._thread.is_alive()


def test_another_dtype_is_that_of_options(path):
    ids, mask = batch()
    options = replace(serving(0, 4), dtype="bfloat16")
    with PetalnodeForCausalLM.from_pretrained(str(path), options=options) as model:
        assert model.dtype == torch.bfloat16
        lora = model.enable_lora(2)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        assert {one.dtype for one in lora.parameters()} == {torch.float32}
        assert any(one.grad.any() for one in lora.parameters())
        assert generate(model, ids[:1], mask[:1]).shape[0] == 1


def test_importing_petalnode_does_not_import_transformers():
    root = Path(petalnode.__file__).parent
    files = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "hf"]
    assert len(files) > 20
    for path in files:
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] not in ("transformers", "peft"), path
                assert not name.startswith("petalnode.hf"), path


def test_without_the_extra_one_sentence_says_so():
    code = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
import petalnode.hf
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("petalnode.errors.UsageError: petalnode.hf needs transformers")
    assert "petalnode[hf]" in last


def test_another_model_than_the_nodes_is_said(path):
    with (
        open_blocking(str(path), serving(0, 4)) as node,
        pytest.raises(UsageError, match="not demo"),
    ):
        PetalnodeForCausalLM.from_pretrained("demo", node=node)


def test_a_node_that_leaves_in_the_middle_of_a_text(path):
    reference, ids, left = load_reference(path), batch(lengths=(7,))[0], []
    before = loops()
    first = open_blocking(str(path), serving(0, 4))
    with (
        first,
        open_blocking(str(path), serving(0, 4, join=(first.value.invite,))) as second,
        PetalnodeForCausalLM.from_pretrained(str(path), join=second.value.invite) as model,
    ):

        def leave(ids, scores, **_):
            if ids.shape[1] == 10:
                (used,) = (node for node in (first, second) if node.value.service.sessions)
                used.close()
                left.append(used)
            return torch.tensor([False])

        options = {"stopping_criteria": [leave], "do_sample": False, "eos_token_id": None}
        got = generate(model, ids, torch.ones_like(ids), **options)
        assert len(left) == 1
        options.pop("stopping_criteria")
        assert got.tolist() == generate(reference, ids, torch.ones_like(ids), **options).tolist()
    assert loops() == before


@pytest.mark.parametrize("use_cache", [False, True])
def test_what_a_call_waits_for_is_reported_and_ctrl_c_ends_it(path, use_cache):
    ids, before, events = batch(lengths=(7,))[0], loops(), []

    def report(event):
        if isinstance(event, Waiting):
            events.append(event)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def call():
        options = NodeOptions(host="127.0.0.1", dtype="float32")
        with PetalnodeForCausalLM.from_pretrained(path, options=options, report=report) as model:
            model(ids, use_cache=use_cache)

    with pytest.raises(KeyboardInterrupt):
        call()
    assert "served by nobody" in events[0].why
    assert loops() == before


def test_ctrl_c_in_backward(path):
    ids, before = batch(lengths=(7,))[0], loops()

    async def interrupted(record, grad):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        await trio.sleep_forever()

    def train():
        with PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4)) as model:
            model.enable_lora(2)
            loss = model(ids, labels=ids).loss
            model.blocks.session.value.backward = interrupted
            loss.backward()

    with pytest.raises(KeyboardInterrupt):
        train()
    assert loops() == before


def test_errors_in_backward_come_out_as_ours(path):
    ids, _ = batch(lengths=(7,))
    with PetalnodeForCausalLM.from_pretrained(str(path), options=serving(0, 4)) as model:
        model.enable_lora(2)
        with pytest.raises(UsageError, match="finite"):
            (model(ids, labels=ids).loss * float("nan")).backward()
        model(ids, labels=ids).loss.backward()
