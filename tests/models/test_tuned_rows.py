"""Rows with adapters of their own in one batch: each gets what it would get alone."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.layers.ragged import WholeRow
from petalnode.models.loading import load_block_span
from petalnode.models.span import RowSlice, Span
from petalnode.models.tuning.rows import TunedRows
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning

from ..checkpoints import MakeCheckpoint
from .reference import load_reference
from .shapes import SHAPES
from .tuned_reference import local, noise, relative_error, some_tuning

BLOOM = SHAPES["bloom"]["untied, odd head"]


@pytest.fixture(scope="module", params=["llama", "bloom"])
def path(request: pytest.FixtureRequest, tiny_checkpoint: MakeCheckpoint) -> Path:
    """A model with fused layers, and one whose rows are put into another order."""
    if request.param == "llama":
        return tiny_checkpoint()
    return tiny_checkpoint(family="bloom", **BLOOM)


@pytest.fixture(scope="module")
def span(path: Path) -> Span:
    return load_block_span(open_checkpoint(str(path)), 0, 4)


def run(span: Span, parts: Sequence[tuple[torch.Tensor, Any, Tuning | None]]) -> list[torch.Tensor]:
    """Return what each row's new hidden states [n, H] become; rows are caches."""
    slices = [RowSlice(row, row.length, len(x), tuning) for x, row, tuning in parts]
    out = span.forward(torch.cat([x for x, _, _ in parts]), slices, span.start, span.end)
    return list(out.split([len(x) for x, _, _ in parts]))


def test_mixed_rows(span: Span, path: Path) -> None:
    """Two tunings and none, in chunks that cut a prompt of five tokens, then one by one."""
    size, model = span.config.hidden_size, load_reference(path)
    first, second = some_tuning(span.config, seed=1), some_tuning(span.config, seed=2)
    tunings = [first, None, second, first, NOTHING, first, first]
    texts = [noise(n, size, seed=n) for n in (9, 9, 12, 7, 8, 10, 6)]
    rows = [span.new_row(0, 4) for _ in texts]
    outs: list[list[torch.Tensor]] = [[] for _ in texts]
    at = 0
    for step in (3, 1, 2, 1, 1, 1, 1, 1, 1):
        going = [i for i, x in enumerate(texts) if len(x) > at]
        parts = [(texts[i][at : at + step], rows[i], tunings[i]) for i in going]
        for i, out in zip(going, run(span, parts), strict=True):
            outs[i].append(out)
        at += step
    for x, tuning, out in zip(texts, tunings, outs, strict=True):
        y, _, _ = local(model, span.config, x, [len(x)], tuning or NOTHING, torch.zeros_like(x))
        assert relative_error(torch.cat(out), y) < 1e-5


def test_rows_without_one_are_left_alone(span: Span) -> None:
    """Bit for bit, beside others that have one, and afterwards."""
    size = span.config.hidden_size
    x, tuning = noise(8, size, seed=1), some_tuning(span.config)
    (plain,) = run(span, [(x, span.new_row(0, 4), None)])
    rows = [span.new_row(0, 4) for _ in range(3)]
    mixed = run(span, list(zip((x, x, x), rows, (tuning, None, tuning), strict=True)))
    assert not torch.allclose(mixed[0], plain)
    torch.testing.assert_close(mixed[1], plain)
    assert torch.equal(mixed[0], mixed[2])
    (after,) = run(span, [(x, span.new_row(0, 4), None)])
    assert torch.equal(after, plain)
    (empty,) = run(span, [(x, span.new_row(0, 4), NOTHING)])
    assert torch.equal(empty, plain)


def test_the_input_is_left_alone(span: Span) -> None:
    """Prompts are added to a copy: the sender's log may hold the very tensor."""
    x = noise(8, span.config.hidden_size, seed=1)
    before = x.clone()
    span.forward(x, [RowSlice(span.new_row(0, 4), 0, 8, some_tuning(span.config))], 0, 4)
    assert torch.equal(x, before)


def test_some_blocks_and_sites(span: Span, path: Path) -> None:
    whole = some_tuning(span.config)
    site = sorted(whole.blocks[2].lora)[0]
    part = Tuning({2: BlockTuning({site: whole.blocks[2].lora[site]}), 3: BlockTuning()})
    x = noise(9, span.config.hidden_size, seed=4)
    (out,) = run(span, [(x, span.new_row(0, 4), part)])
    y, _, _ = local(load_reference(path), span.config, x, [9], part, torch.zeros_like(x))
    assert relative_error(out, y) < 1e-5
    (plain,) = run(span, [(x, span.new_row(0, 4), None)])
    assert not torch.allclose(out, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_spans_take_any_dtype(path: Path, dtype: str) -> None:
    which = getattr(torch, dtype)
    span = load_block_span(open_checkpoint(str(path)), 0, 4, dtype=which)
    x, tuning = noise(9, span.config.hidden_size, seed=4), some_tuning(span.config)
    exact, _, _ = local(load_reference(path), span.config, x, [9], tuning, torch.zeros_like(x))
    for one in (tuning, tuning.to(which, span.device)):
        (out,) = run(span, [(x, span.new_row(0, 4), one)])
        assert out.dtype == which
        assert 0 < relative_error(out, exact) < 0.05


def test_neighbours_with_one_tuning_are_one_range() -> None:
    pair = LowRank(noise(1, 4, seed=1), noise(4, 1, seed=2), 1.0)
    a, b = Tuning({0: BlockTuning({"q": pair})}), Tuning({0: BlockTuning({"q": pair})})
    rows = TunedRows(
        [
            WholeRow(3, a),
            WholeRow(2, a),
            WholeRow(1),
            WholeRow(4, a),
            WholeRow(5, b),
            WholeRow(1, b),
        ]
    )
    cut = [(one.begin, one.end) for one in rows.additions(0)]
    assert cut == [(0, 5), (6, 10), (10, 16)]
    assert list(rows.additions(1)) == []


def test_prompts_go_to_the_positions_that_they_are_for() -> None:
    """Of rows that are at different places, and not to the layers."""
    prompted = Tuning({0: BlockTuning(prompt=torch.tensor([[1.0], [2.0], [3.0]]))})

    def prompts(*rows: tuple[int, int, Tuning | None]) -> list[float]:
        added = TunedRows([SimpleNamespace(position=p, n=n, tuning=t) for p, n, t in rows])
        assert list(added.additions(0)) == []
        x = torch.zeros(sum(n for _, n, _ in rows), 1)
        y = added.prompted(0, x)
        assert not x.any(), "the input is somebody else's"
        return [float(one) for one in y]

    assert prompts((0, 5, prompted)) == [1, 2, 3, 0, 0]
    assert prompts((1, 1, prompted), (3, 2, prompted), (0, 2, prompted)) == [2, 0, 0, 1, 2]
    assert prompts((0, 2, None), (2, 2, prompted), (0, 1, NOTHING)) == [0, 0, 3, 0, 0]
    rows = TunedRows([SimpleNamespace(position=3, n=2, tuning=prompted)])
    x = torch.zeros(2, 1)
    assert rows.prompted(0, x) is x, "nothing is copied for nothing"
