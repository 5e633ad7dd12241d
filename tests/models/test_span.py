"""Spans and row caches: sub-spans, growth, rollback, and what callers may not do."""

from typing import Any

import pytest
import torch

from petalnode.errors import LocalProtocolError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.families.llama import PreNormBlock
from petalnode.models.kv_cache import MIN_TOKENS, RowCache
from petalnode.models.loading import load_block_span
from petalnode.models.span import RowSlice, Span

from ..checkpoints import MakeCheckpoint

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def span(tiny_checkpoint: MakeCheckpoint) -> Span:
    """Blocks 1 to 4 of 4, so that a confused index shows."""
    return load_block_span(open_checkpoint(str(tiny_checkpoint())), 1, 4, **CPU)


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn((tokens, 64), generator=torch.Generator().manual_seed(tokens))


def test_sub_spans_chain_to_the_span(span: Span) -> None:
    x = hidden(20)
    whole = span.forward(x, [RowSlice(span.new_row(1, 4), 0, 20)], 1, 4)
    first = span.forward(x, [RowSlice(span.new_row(1, 3), 0, 20)], 1, 3)
    both = span.forward(first, [RowSlice(span.new_row(3, 4), 0, 20)], 3, 4)
    assert torch.equal(both, whole)


def test_one_row_in_several_calls(span: Span) -> None:
    """Its length advances with its last block, not before."""
    x, row = hidden(20), span.new_row(1, 4)
    whole = span.forward(x, [RowSlice(span.new_row(1, 4), 0, 20)], 1, 4)
    first = span.forward(x, [RowSlice(row, 0, 20)], 1, 3)
    assert row.length == 0
    assert torch.equal(span.forward(first, [RowSlice(row, 0, 20)], 3, 4), whole)
    assert row.length == 20


def test_the_input_is_left_alone(span: Span) -> None:
    """The sender's replay log may hold the very tensor."""
    x = hidden(5)
    before = x.clone()
    span.forward(x, [RowSlice(span.new_row(1, 4), 0, 5)], 1, 4)
    assert torch.equal(x, before)


def test_memory_grows_with_use(span: Span) -> None:
    row = span.new_row(1, 4)
    assert row.nbytes == 0
    per_token = 3 * span.kv_bytes_per_token
    span.forward(hidden(1), [RowSlice(row, 0, 1)], 1, 4)
    assert row.nbytes == MIN_TOKENS * per_token
    for position in range(1, 400):
        span.forward(hidden(1), [RowSlice(row, position, 1)], 1, 4)
        assert row.nbytes <= max(MIN_TOKENS, 1.5 * row.length) * per_token
    big = span.new_row(1, 4)
    span.forward(hidden(300), [RowSlice(big, 0, 300)], 1, 4)
    assert big.nbytes == 300 * per_token


def test_growth_keeps_what_was_there() -> None:
    row = RowCache(0, 1, 2, 4, torch.float32, torch.device("cpu"))
    new = torch.randn(2, 2, 5 * MIN_TOKENS, 4)
    for n in (1, MIN_TOKENS, 3, 2 * MIN_TOKENS):
        at = row.length
        keys, values = row.extend(0, new[:, :, at : at + n])
        row.advance(n)
        assert torch.equal(keys, new[0, :, : row.length])
        assert torch.equal(values, new[1, :, : row.length])


def test_truncate_is_free_and_checked(span: Span) -> None:
    row = span.new_row(1, 4)
    span.forward(hidden(100), [RowSlice(row, 0, 100)], 1, 4)
    held = row.nbytes
    row.truncate(10)
    assert (row.length, row.nbytes) == (10, held)
    for length in (11, -1):
        with pytest.raises(ValueError, match="cannot truncate"):
            row.truncate(length)


def test_a_failure_half_way_changes_no_row(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [span.new_row(1, 4) for _ in range(2)]
    x = hidden(90)
    span.forward(x[:10], [RowSlice(rows[0], 0, 4), RowSlice(rows[1], 0, 6)], 1, 4)
    slices = [RowSlice(rows[0], 4, 1), RowSlice(rows[1], 6, 79)]
    forward, calls = PreNormBlock.forward, iter((False, True))

    def fail_in_block_2(block: PreNormBlock, *args: Any) -> torch.Tensor:
        out = forward(block, *args)
        if next(calls):
            raise MemoryError
        return out

    with monkeypatch.context() as patch:
        patch.setattr(PreNormBlock, "forward", fail_in_block_2)
        with pytest.raises(MemoryError):
            span.forward(x[10:], slices, 1, 4)
    assert [row.length for row in rows] == [4, 6]
    again = span.forward(x[10:], slices, 1, 4)
    fresh = [span.new_row(1, 4) for _ in range(2)]
    span.forward(x[:10], [RowSlice(fresh[0], 0, 4), RowSlice(fresh[1], 0, 6)], 1, 4)
    slices = [RowSlice(fresh[0], 4, 1), RowSlice(fresh[1], 6, 79)]
    assert torch.equal(again, span.forward(x[10:], slices, 1, 4))


def test_rows_do_not_see_each_other(span: Span) -> None:
    alone = span.forward(hidden(7), [RowSlice(span.new_row(1, 4), 0, 7)], 1, 4)
    x = torch.cat((hidden(3), hidden(7), hidden(9)))
    slices = [RowSlice(span.new_row(1, 4), 0, n) for n in (3, 7, 9)]
    together = span.forward(x, slices, 1, 4)
    torch.testing.assert_close(together[3:10], alone)


def test_callers_that_break_the_rules(span: Span) -> None:
    row, other = span.new_row(1, 4), span.new_row(2, 4)
    x = hidden(3)
    bad: list[tuple[torch.Tensor, list[RowSlice], int, int]] = [
        (x, [RowSlice(row, 0, 2)], 1, 4),
        (x, [], 1, 4),
        (x[:, :5], [RowSlice(row, 0, 3)], 1, 4),
        (x, [RowSlice(row, 1, 3)], 1, 4),
        (x, [RowSlice(row, 0, 3), RowSlice(other, 0, 0)], 1, 4),
        (x, [RowSlice(row, 0, 2), RowSlice(row, 0, 1)], 1, 4),
        (x, [RowSlice(other, 0, 3)], 1, 4),
        (x, [RowSlice(row, 0, 3)], 0, 4),
        (x, [RowSlice(row, 0, 3)], 1, 5),
        (x, [RowSlice(row, 0, 3)], 2, 2),
    ]
    for arguments in bad:
        with pytest.raises(LocalProtocolError):
            span.forward(*arguments)
    assert row.length == other.length == 0
    with pytest.raises(LocalProtocolError):
        span.new_row(0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_input_in_another_dtype(tiny_checkpoint: MakeCheckpoint, dtype: torch.dtype) -> None:
    """The wire may carry another dtype than the span computes in; the result is the span's."""
    path = str(tiny_checkpoint())
    span = load_block_span(open_checkpoint(path), 0, 1, dtype=dtype, device=torch.device("cpu"))
    out = span.forward(hidden(2), [RowSlice(span.new_row(0, 1), 0, 2)], 0, 1)
    assert out.dtype == span.dtype == dtype
