"""Numbers that are not finite are found wherever they are."""

import pytest
import torch

from petalnode.models.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_is_found_anywhere(dtype: torch.dtype, bad: float) -> None:
    """Vectors, their rest, and what is not contiguous."""
    for size in (1, 7, 16, 33, 100):
        tensor = torch.linspace(-9, 9, size).to(dtype)
        assert is_finite(tensor)
        for at in range(size):
            broken = tensor.clone()
            broken[at] = bad
            assert not is_finite(broken)
            assert not is_finite(broken.expand(3, size).t())


def test_the_largest_numbers_and_none_at_all() -> None:
    """A sum of these would not be finite."""
    largest = torch.finfo(torch.float32).max
    assert is_finite(torch.tensor([largest, largest, -largest]))
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.ones(2, requires_grad=True))
