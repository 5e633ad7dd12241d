"""A tuning as frames, and back; what breaks the format is told, and allocates nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalnode.errors import LocalProtocolError
from petalnode.models.tuning.tuning import NOTHING, BlockTuning, LowRank, Tuning
from petalnode.p2p.frames import ALIGN, MAX_TENSORS, Frame, encode
from petalnode.protocol import MAX_BLOCKS, BadMessage
from petalnode.tensor_frames import MAX_MATRIX_ROWS, TensorCollector, TooLarge, pack_tensors
from petalnode.tuning_wire import MAX_BLOCK_TENSORS, Collector, pack


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tuning(blocks=(1, 2), rank=2, sites=("self_attn.q_proj", "mlp.up_proj")):
    return Tuning(
        {
            index: BlockTuning(
                {
                    site: LowRank(numbers(rank, 8, seed=index), numbers(12, rank), 0.5 + index)
                    for site in sites
                },
                numbers(5, 8, seed=7),
            )
            for index in blocks
        }
    )


def collected(frames, start=0, end=4, limit=1 << 20):
    collector, results = Collector(start, end, limit), []
    for header, tensors in frames:
        results.append(collector.take(Frame(header, list(tensors))))
    assert results[:-1] == [None] * (len(results) - 1)
    return results[-1]


def same(one, other):
    mine, theirs = dict(one.named()), dict(other.named())
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for index, block in one.blocks.items():
        assert {s: pair.scale for s, pair in block.lora.items()} == {
            s: pair.scale for s, pair in other.blocks[index].lora.items()
        }


@given(max_bytes=st.integers(64, 4096), rank=st.integers(1, 9))
def test_it_comes_out_as_it_went_in_whatever_the_frames(max_bytes, rank):
    frames = list(pack(tuning(rank=rank), max_bytes, version=3))
    same(collected(frames), tuning(rank=rank))
    assert {(header["type"], header["version"]) for header, _ in frames} == {("tuning", 3)}
    for header, tensors in frames:
        assert 1 <= len(tensors) <= MAX_TENSORS
        encode(header, tensors, max_payload=max_bytes)
        assert header["last"] is (header is frames[-1][0])


def test_nothing_is_one_frame():
    ((header, tensors),) = pack(NOTHING, 64)
    assert header == {"type": "tuning", "version": 0, "parts": [], "last": True}
    same(collected([(header, tensors)]), NOTHING)


def test_frames_are_as_full_as_they_may_be():
    """A row of 64 bytes, and what aligning the next may take."""
    named = [("x", numbers(1, 16)), ("y", numbers(1, 16))]
    for max_bytes, frames in ((128 + ALIGN, 1), (127 + ALIGN, 2), (64, 2)):
        made = list(pack_tensors({}, named, max_bytes))
        assert [len(tensors) for _, tensors in made] == [3 - frames] * frames
    one, two, three = pack_tensors({}, [("x", numbers(5, 16))], 128)
    assert [header["parts"] for header, _ in (one, two, three)] == [
        [["x", 5, first, 1.0]] for first in (0, 2, 4)
    ]


def test_a_row_that_fits_no_frame_is_our_own_fault():
    with pytest.raises(LocalProtocolError, match="256 bytes"):
        list(pack_tensors({}, [("x", numbers(2, 64))], 255))
    assert len(list(pack_tensors({}, [("x", numbers(2, 64))], 256))) == 2


def test_what_is_sent_needs_no_gradient():
    ((_, (tensor,)),) = pack_tensors({}, [("x", numbers(2, 4).requires_grad_())], 200)
    assert not tensor.requires_grad


def frame(*parts, last=True, tensors=None):
    given = [numbers(2, 4) for _ in parts] if tensors is None else tensors
    return Frame({"type": "tuning", "parts": list(parts), "last": last}, given)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (Frame({"last": True}), "parts"),
        (frame(["0.prompt", 2, 0, 1.0], tensors=[]), "one for each"),
        (frame(["0.prompt", 2, 0]), "a part is not"),
        (frame(7), "a part is not"),
        (frame("0abc"), "a part is not"),
        (frame([7, 2, 0, 1.0]), "text"),
        (frame(["0.\x1b[2J\n", 2, 0, 1.0]), "cannot be printed"),
        (frame(["0.prompt", 1, 0, 1.0]), "more rows"),
        (frame(["0.prompt", 3, 0, 1.0], ["0.prompt", 3, 2, 1.0]), "more rows"),
        (frame(["0.prompt", MAX_MATRIX_ROWS + 1, 0, 1.0]), "whole number"),
        (frame(["0.prompt", 2, -1, 1.0]), "whole number"),
        (frame(["0.prompt", 4, 2, 1.0]), "nothing came before"),
        (frame(["0.prompt", 4, 0, 1.0]), "0.prompt is not complete"),
        (frame(["0.prompt", 4, 0, 1.0], ["1.prompt", 4, 2, 1.0]), "does not follow"),
        (frame(["0.prompt", 2, 0, 1.0], ["0.prompt", 2, 0, 1.0]), "nothing came before"),
        (frame(["0.prompt", 2, 0, float("nan")]), "finite"),
        (frame(["0.prompt", 2, 0, True]), "finite"),
        (frame(["0.prompt", 1 << 20, 0, 1.0]), "larger than it may be"),
        (frame(["0.prompt", 2, 0, 1.0], tensors=[torch.zeros(2, 4, dtype=torch.int64)]), "matrix"),
        (frame(["0.prompt", 2, 0, 1.0], tensors=[torch.zeros(4)]), "matrix"),
        (frame(["0.prompt", 2, 0, 1.0], tensors=[torch.zeros(2, 0)]), "matrix"),
        (frame(last=False), "without anything"),
        (frame(["4.prompt", 2, 0, 1.0]), "none of the blocks"),
        (frame(["-1.prompt", 2, 0, 1.0]), "names no tensor"),
        (frame(["²3.prompt", 2, 0, 1.0]), "names no tensor"),
        (frame([f"{10**30}.prompt", 2, 0, 1.0]), "names no tensor"),
        (frame(["0.q.a", 2, 0, 1.0]), "pair"),
        (frame(["0.q.a", 2, 0, 1.0], ["0.q.b", 2, 0, 1.0], ["0.q.c", 2, 0, 1.0]), "names no"),
        (frame(["01.prompt", 2, 0, 1.0]), "names no tensor"),
        (frame(["0.q.b", 2, 0, 1.0]), "pair"),
        (frame(["0", 2, 0, 1.0]), "pair"),
    ],
)
def test_broken_frames(broken, why):
    with pytest.raises(BadMessage, match=why):
        Collector(0, 4, 1000).take(broken)


def test_a_frame_holds_as_many_small_ones_as_it_may():
    named = [(str(index), torch.zeros(1, 1)) for index in range(2 * MAX_TENSORS + 1)]
    frames = list(pack_tensors({}, named, 1 << 20))
    assert [len(tensors) for _, tensors in frames] == [MAX_TENSORS, MAX_TENSORS, 1]
    assert [header["last"] for header, _ in frames] == [False, False, True]


@pytest.mark.parametrize(("dtype", "counted"), [("float32", 4), ("bfloat16", 4), ("float64", 8)])
def test_a_matrix_counts_when_its_first_rows_come(dtype, counted):
    tensors = [torch.zeros(2, 4, dtype=getattr(torch, dtype))]
    first = frame(["x", 6, 0, 1.0], last=False, tensors=tensors)
    collector = TensorCollector(24 * counted, 4)
    assert not collector.add(first)
    assert collector.nbytes == 24 * counted
    assert not collector.add(frame(["x", 6, 2, 1.0], last=False, tensors=tensors))
    assert collector.nbytes == 24 * counted
    with pytest.raises(TooLarge, match="x is larger"):
        TensorCollector(24 * counted - 1, 4).add(first)


def test_what_came_before_counts():
    """A limit on each matrix alone would be none."""
    collector = TensorCollector(2 * 32, 4)
    assert not collector.add(frame(["x", 2, 0, 1.0], ["y", 2, 0, 1.0], last=False))
    assert collector.nbytes == 2 * 32
    with pytest.raises(TooLarge, match="z is larger"):
        collector.add(frame(["z", 1, 0, 1.0], tensors=[numbers(1, 1)]))


@pytest.mark.parametrize("other", [numbers(2, 5), numbers(2, 4).bfloat16()])
def test_parts_that_do_not_fit_together(other):
    collector = TensorCollector(1000, 4)
    assert not collector.add(frame(["x", 4, 0, 1.0], last=False))
    with pytest.raises(BadMessage, match="parts of x do not fit together"):
        collector.add(frame(["x", 4, 2, 1.0], tensors=[other]))


def test_as_many_tensors_as_its_blocks_can_have():
    """However far up in the model they are."""
    collector = Collector(2, 4, 1 << 20)
    for index in (2, 3):
        names = [[f"{index}.s{n}.a", 2, 0, 1.0] for n in range(MAX_BLOCK_TENSORS)]
        assert collector.take(frame(*names, last=False)) is None
    assert collector.nbytes == 2 * MAX_BLOCK_TENSORS * 32
    with pytest.raises(BadMessage, match="more than 128 tensors"):
        collector.take(frame(["2.prompt", 2, 0, 1.0]))


def test_the_blocks_of_a_long_model():
    last = MAX_BLOCKS - 1
    part = Tuning({last: BlockTuning(prompt=numbers(2, 4))})
    ((header, tensors),) = pack(part, 512)
    same(Collector(last, MAX_BLOCKS, 1 << 20).take(Frame(header, tensors)), part)


def test_a_scale_may_be_a_whole_number():
    whole = Tuning({1: BlockTuning({"q": LowRank(numbers(2, 4), numbers(4, 2), 2)})})
    same(collected(pack(whole, 512)), whole)


def test_only_its_own_part_is_taken():
    part = tuning((0, 1, 2, 3)).within(2, 4)
    same(collected(pack(part, 512), 2, 4), part)
    with pytest.raises(BadMessage, match="none of the blocks 2:4"):
        collected(pack(tuning((1,)), 512), 2, 4)
    with pytest.raises(BadMessage, match="none of the blocks 2:4"):
        Collector(2, 4, 1000).take(frame(["4.prompt", 2, 0, 1.0]))
