"""Our norm and activation: the numbers of the library's, and nothing of the caller's is lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from petalnode.models.layers.norms import rms_norm
from petalnode.models.layers.weights import TorchParts

from .tuned_reference import noise

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (5, 3, 64)])
def test_rms_norm_is_the_librarys_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(64).to(dtype)
    before = x.clone()
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (64,), weight, EPS))
    assert torch.equal(x, before)


def test_rms_norm_of_heads_side_by_side() -> None:
    """Queries in front of keys and values: not contiguous."""
    heads, weight = torch.randn(5, 6, 8)[:, :4], torch.randn(8)
    assert torch.equal(rms_norm(heads, weight, EPS), F.rms_norm(heads, (8,), weight, EPS))


def test_the_gradient_of_rms_norm() -> None:
    x, weight, grad = noise(7, 64, seed=1).requires_grad_(), torch.randn(64), noise(7, 64, seed=2)
    ours, theirs = (
        torch.autograd.grad(y, x, grad)[0]
        for y in (rms_norm(x, weight, EPS), F.rms_norm(x, (64,), weight, EPS))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def silu(x: Tensor) -> Tensor:
    return TorchParts(torch.float32, torch.device("cpu")).activation("silu")(x)


def test_silu_needs_no_memory_without_a_gradient() -> None:
    x = noise(3, 8, seed=3)
    expected = F.silu(x)
    assert silu(x).data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


def test_silu_leaves_what_a_gradient_needs() -> None:
    x = noise(3, 8, seed=3).requires_grad_()
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (silu, F.silu)]
    assert torch.equal(*grads)
