"""The local modules of ``petalnode.hf`` compute what a node's own client parts compute."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnode.errors import UsageError
from petalnode.hf.local import LocalModules, freeze, unfreeze
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_client

from ..models.shapes import SHAPES
from .test_forward import batch, close

EVERY = [(family, next(iter(shapes))) for family, shapes in SHAPES.items()]
EVERY += [("opt", shape) for shape in list(SHAPES["opt"])[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_the_ends_of_every_family(tiny_checkpoint, family, shape, dtype):
    checkpoint = open_checkpoint(str(tiny_checkpoint(family=family, **SHAPES[family][shape])))
    local, own = LocalModules(checkpoint, dtype), load_client(checkpoint, dtype=dtype)
    ids, positions = batch()[0] % checkpoint.config.vocab_size, torch.arange(7).expand(3, 7)
    want = own.embed(ids.flatten(), positions.flatten())
    got = local.embed(ids, positions)
    assert got.dtype == want.dtype == dtype
    assert torch.equal(got.flatten(0, 1), want)
    logits = local.logits(got)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.flatten(0, 1), own.logits(want))
    assert list(local.parameters()) == []
    assert {local.head.weight.dtype, local.embeddings.weight.dtype} == {dtype}


def test_tables_stay_as_small_as_the_checkpoint_has_them(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint(family="opt", **next(iter(SHAPES["opt"].values())))
    tensors = load_file(path / "model.safetensors")
    halved = {name: one.bfloat16() for name, one in tensors.items()}
    save_file(halved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    checkpoint = open_checkpoint(str(tmp_path))
    local, own = LocalModules(checkpoint, torch.float32), load_client(checkpoint)
    assert {local.head.weight.dtype, local.embeddings.weight.dtype} == {torch.bfloat16}
    ids, positions = batch()[0], torch.arange(7).expand(3, 7)
    got, want = local.embed(ids, positions), own.embed(ids.flatten(), positions.flatten())
    assert got.dtype == local.embeddings(ids).dtype == torch.float32
    assert torch.equal(got.flatten(0, 1), want)
    given = local.embeddings(ids).double()  # such as somebody else made
    assert local.embed(given, positions).dtype == torch.float32
    assert torch.equal(local.logits(got).flatten(0, 1), own.logits(want))


@pytest.fixture
def local(tiny_checkpoint):
    """Tables smaller than float32; a family whose norms are widened."""
    path = tiny_checkpoint(family="gemma2", **next(iter(SHAPES["gemma2"].values())))
    return LocalModules(open_checkpoint(str(path)), torch.bfloat16)


def test_what_is_trained_is_kept_in_float32(local):
    ids, positions = batch()[0], torch.arange(7).expand(3, 7)
    before = local.logits(local.embed(ids, positions))
    unfreeze(local)
    assert {one.dtype for one in local.parameters()} == {torch.float32}
    logits = local.logits(local.embed(ids, positions))
    close(logits, before, atol=1e-6)
    logits.square().mean().backward()
    assert all(one.grad.isfinite().all() and one.grad.any() for one in local.parameters())
    freeze(local)
    assert list(local.parameters()) == []
    assert not any(one.requires_grad for one in local.buffers())
    close(local.logits(local.embed(ids, positions)), before, atol=1e-6)


def test_products_by_slices_of_the_vocabulary(local, monkeypatch):
    """A graph for the hidden states' gradient keeps no copy of the table in their dtype."""
    x = torch.randn(2, 3, local.embeddings.weight.shape[1], generator=torch.Generator())
    x.requires_grad_()
    want = x @ local.head.weight.float().T
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    for module in ("petalnode.hf.local", "petalnode.models.layers.weights"):
        monkeypatch.setattr(f"{module}.VOCABULARY_SLICE", 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, id):
        got = local.head.project(x)
    assert sum(one.nbytes for one in kept) < local.head.weight.nbytes
    close(got, want)
    (again,) = torch.autograd.grad(local.head.project(x).square().sum(), x)
    close(again, gradient, atol=1e-3)
    unfreeze(local.head)
    halved = x.detach().bfloat16().requires_grad_()
    got = local.head.project(halved)
    close(got, want, atol=0.2)
    got.square().sum().backward()
    assert local.head.weight.grad.any(1).all()
    assert halved.grad.any()


def test_ids_and_positions_that_the_model_does_not_have(local):
    vocab, most = len(local.embeddings.weight), local._config.max_positions
    last = torch.tensor([[0, vocab - 1]])
    local.embed(last, torch.tensor([[0, most - 1]]))
    for ids in (last + 1, last - 1):
        with pytest.raises(UsageError, match=f"0 to {vocab - 1}"):
            local.embed(ids, torch.tensor([[0, 1]]))
    with pytest.raises(UsageError, match=f"{most + 1} tokens"):
        local.embed(last, torch.tensor([[0, most]]))
