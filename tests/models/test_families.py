"""Every family against transformers, float32: logits within 1e-4, greedy tokens equal."""

from pathlib import Path
from typing import Any

import pytest

from petalnode.models.families import FAMILIES

from ..checkpoints import MakeCheckpoint
from . import parity
from .reference import load_reference
from .shapes import SHAPES

CASES = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]


def test_every_family_is_compared() -> None:
    assert set(SHAPES) >= set(FAMILIES)
    assert all(len(shapes) >= 3 for shapes in SHAPES.values())


@pytest.fixture(scope="module", params=CASES, ids=[f"{f}: {s}" for f, s in CASES])
def model(request: pytest.FixtureRequest, tiny_checkpoint: MakeCheckpoint) -> tuple[Path, Any]:
    family, shape = request.param
    path = tiny_checkpoint(family=family, **SHAPES[family][shape])
    return path, load_reference(path)


@pytest.mark.parametrize("check", parity.LOGIT_CHECKS)
def test_logits(model: tuple[Path, Any], check: Any) -> None:
    assert check(*model) < parity.TOLERANCE


def test_greedy_tokens(model: tuple[Path, Any]) -> None:
    ours, theirs = parity.greedy_tokens(*model)
    assert len(set(theirs)) > 8, "a text that repeats itself shows nothing"
    assert ours == theirs


def test_bfloat16(model: tuple[Path, Any]) -> None:
    """Not further from float32 than 1.25 times what transformers in bfloat16 is."""
    path, exact = model
    ours, theirs = parity.half_error(path, exact, load_reference(path, "bfloat16"))
    assert 0 < ours < 1.25 * theirs
