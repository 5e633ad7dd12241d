"""ALiBi against transformers: slopes of any number of heads, and Falcon's coarse positions."""

import pytest
import torch

from petalnode.models.layers.attention import alibi_slopes

from ..checkpoints import MakeCheckpoint
from . import parity
from .reference import Local, load_reference, reference_logits
from .shapes import SHAPES


@pytest.mark.parametrize("heads", [1, 2, 3, 7, 8, 11, 32, 71, 112])
def test_slopes(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones((1, 2)), heads, torch.float32)[:, 0, 1]
    ours = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("heads", [3, 7, 8, 32, 71])
def test_slopes_rounded(heads: int) -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones((1, 2)), heads, torch.float32)[:, 0, 1]
    assert torch.tensor(alibi_slopes(heads)).bfloat16().float().equal(theirs)


@pytest.mark.parametrize("shape", ["RW: sequential, biases, ALiBi", "7B with biases and ALiBi"])
def test_positions_that_bfloat16_cannot_tell_apart(
    tiny_checkpoint: MakeCheckpoint, shape: str
) -> None:
    """Beyond 256 Falcon's keys share positions; a text in chunks must share the same."""
    path = tiny_checkpoint(family="falcon", **SHAPES["falcon"][shape])
    ids = parity.prompt(420, 301)
    expected = reference_logits(load_reference(path), ids)
    local = Local(path)
    row = local.row()
    ours = [local.step([row], [ids[a:b]]) for a, b in ((0, 301), (301, 302), (302, 420))]
    assert parity.difference(torch.cat(ours), expected) < parity.TOLERANCE
