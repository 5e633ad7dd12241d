"""The client's part under autograd: embeddings as data, logits with a graph back to the blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.layers import weights
from petalnode.models.loading import load_client

from ..checkpoints import MakeCheckpoint
from .parity import prompt
from .reference import load_reference
from .shapes import SHAPES
from .tuned_reference import TOLERANCE, noise, relative_error

FIRST = {family: next(iter(shapes)) for family, shapes in SHAPES.items()}
IDS = torch.tensor(prompt(21, 301))


@pytest.mark.parametrize("family", FIRST)
def test_the_gradient_of_a_loss(tiny_checkpoint: MakeCheckpoint, family: str) -> None:
    """Of the last block's output, through final norm, head, caps; as transformers has it."""
    path = tiny_checkpoint(family=family, **SHAPES[family][FIRST[family]])
    client, model = load_client(open_checkpoint(str(path))), load_reference(path)
    x = noise(len(IDS), client.config.hidden_size, seed=1)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    logits = client.logits_trainable(ours)
    assert torch.equal(logits, client.logits(x)), "a graph changes nothing"
    F.cross_entropy(logits[:-1], IDS[1:]).backward()
    F.cross_entropy(head_of(model, theirs)[:-1], IDS[1:]).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert relative_error(ours.grad, theirs.grad) < TOLERANCE


def head_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' model where its last block gives x [T, H]."""
    body = model.base_model
    body = getattr(body, "language_model", getattr(body, "decoder", body))
    blocks = body.h if hasattr(body, "h") else body.layers

    def replaced(module: Any, args: Any, output: Any) -> Any:
        return (x.unsqueeze(0), *output[1:]) if isinstance(output, tuple) else x.unsqueeze(0)

    hook = blocks[-1].register_forward_hook(replaced)
    logits: torch.Tensor = model(input_ids=IDS.unsqueeze(0), use_cache=False).logits[0]
    hook.remove()
    return logits


@pytest.mark.parametrize("family", FIRST)
def test_embeddings_are_data(tiny_checkpoint: MakeCheckpoint, family: str) -> None:
    """What `embed` gives, as a tensor that a graph can hold; nothing of the model is trained."""
    path = tiny_checkpoint(family=family, **SHAPES[family][FIRST[family]])
    client = load_client(open_checkpoint(str(path)))
    positions = torch.arange(len(IDS))
    x = client.embed_trainable(IDS, positions)
    assert torch.equal(x, client.embed(IDS, positions))
    assert not x.requires_grad
    factor = torch.ones(client.config.hidden_size, requires_grad=True)
    (x * factor).sum().backward()
    assert factor.grad is not None
    torch.testing.assert_close(factor.grad, x.sum(0))


def test_a_head_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its converted slices are not kept in the graph, and the gradient is the same."""
    table = weights.VocabularyMatrix(torch.float32, torch.device("cpu"))
    matrix, x, grad = noise(100, 32, seed=1).bfloat16(), noise(5, 32, seed=2), noise(5, 100, seed=3)
    table.fill(matrix)
    plain, sliced = (x.clone().requires_grad_() for _ in range(2))
    (plain @ matrix.float().T).backward(grad)
    monkeypatch.setattr(weights, "VOCABULARY_SLICE", 30)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = table.project(sliced)
    assert 30 * 32 not in kept
    assert torch.equal(out.detach(), table.project(x))
    out.backward(grad)
    assert sliced.grad is not None
    assert plain.grad is not None
    assert relative_error(sliced.grad, plain.grad) < 1e-5
