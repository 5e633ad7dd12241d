"""The embeddings and the head stay in the checkpoint's dtype; products are in the activations'."""

import pytest
import torch

import petalnode.models.layers.weights as weights
from petalnode.models.layers.weights import TorchParts

CPU = torch.device("cpu")


def test_no_copy_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 table under float32 activations: half the bytes, the logits of a float32 copy."""
    monkeypatch.setattr(weights, "VOCABULARY_SLICE", 7)
    torch.manual_seed(0)
    stored, x = torch.randn(30, 16).bfloat16(), torch.randn(3, 16)
    parts = TorchParts(torch.float32, CPU)
    table = parts.vocabulary("head", 30, 16)
    parts.targets["head"](stored)
    assert parts.nbytes == table.nbytes == 30 * 16 * 2
    torch.testing.assert_close(table.project(x), x @ stored.float().T)
    assert torch.equal(table.lookup(torch.tensor([4, 29])), stored[[4, 29]].float())


def test_no_larger_than_the_activations() -> None:
    parts = TorchParts(torch.bfloat16, CPU)
    table = parts.vocabulary("head", 30, 16)
    parts.targets["head"](torch.randn(30, 16))
    assert table.nbytes == 30 * 16 * 2
    assert table.project(torch.ones(1, 16).bfloat16()).dtype == torch.float32
