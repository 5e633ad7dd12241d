"""How a batch is cut, summed and spread; what a job may be."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalnode.protocol import BadMessage
from petalnode.training.batches import MIN_TOKENS, ONE_HOP, PIPELINE, OrderedSum, cut
from petalnode.training.protocol import Job, OpenTraining
from petalnode.training.spread import Offer, soonest

OPENED = OpenTraining("f", 2, 6)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.sampled_from([PIPELINE, ONE_HOP]))
def test_a_cut_keeps_whole_rows_in_order(lengths, how):
    micros = cut(lengths, how)
    assert [n for micro in micros for n in micro.lengths] == lengths
    assert [micro.first for micro in micros] == [
        sum(micro.tokens for micro in micros[:index]) for index in range(len(micros))
    ]
    assert all(micro.tokens <= how.most or len(micro.lengths) == 1 for micro in micros)
    for one, two in pairwise(micros):
        assert one.tokens + two.lengths[0] > MIN_TOKENS


def test_cuts():
    assert [micro.tokens for micro in cut([128])] == [128]
    assert [micro.tokens for micro in cut([64] * 4)] == [128, 128]
    assert [micro.tokens for micro in cut([128] * 8)] == [256] * 4
    assert [micro.tokens for micro in cut([10, 900, 10])] == [10, 900, 10]
    assert [micro.tokens for micro in cut([128] * 8, ONE_HOP)] == [384, 384, 256]
    assert [micro.tokens for micro in cut([128] * 12, ONE_HOP)] == [384] * 4
    assert [micro.tokens for micro in cut([1] * 600, ONE_HOP)] == [256, 256, 88], "rows of a job"


def test_sums_are_made_in_order_whatever_comes_first():
    parts = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([-1e8, 1.0])]
    totals = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        sums = OrderedSum()
        for number in order:
            sums.add(number, {"w": parts[number]})
        totals.append(sums.total["w"])
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert torch.equal(parts[0], torch.tensor([1e8, 1.0]))


A, B = Offer("a", 0, 4, 1.0, 0.0), Offer("b", 4, 8, 1.0, 0.0)


def chosen(offers, stages, busy_s, tokens=1, span=(0, 8)):
    choice = soonest(offers, stages, busy_s, span, tokens)
    return None if choice is None else (choice.offer.peer_id, choice.end)


def test_the_replica_that_is_done_first():
    fast, slow = Offer("fast", 0, 8, 1.0, 0.0), Offer("slow", 0, 8, 3.0, 0.0)
    whole = {(0, 8)}
    assert chosen([slow, fast], whole, {}) == ("fast", 8)
    assert chosen([slow, fast], whole, {"fast": 15.9}) == ("fast", 8)
    assert chosen([slow, fast], whole, {"fast": 16.1}) == ("slow", 8)


def test_the_way_that_ends_first_not_the_first_step():
    stages = {(0, 4), (4, 8), (0, 8)}
    wide = Offer("wide", 0, 8, 1.2, 0.0)
    assert chosen([A, B, wide], stages, {}) == ("a", 4)
    assert chosen([A, B, wide], stages, {"a": 3.0, "b": 9.0}) == ("wide", 8)
    assert chosen([A, B, wide], stages, {"b": 9.0}) == ("a", 4)
    assert chosen([A, B], stages, {}, span=(4, 8)) == ("b", 8)


def test_a_visit_costs_and_a_gap_is_no_way():
    far = Offer("far", 0, 8, 1.0, 10.0)
    near = Offer("near", 0, 8, 2.0, 0.0)
    assert chosen([far, near], {(0, 8)}, {}, tokens=1) == ("near", 8)
    assert chosen([far, near], {(0, 8)}, {}, tokens=9) == ("far", 8)
    assert chosen([A], {(0, 4), (4, 8)}, {}) is None
    assert chosen([A, B], {(0, 8)}, {}) is None


def test_a_job_comes_out_as_it_went_in():
    job = Job("backward", 7, 3, 5, (4, 1, 9), 2)
    assert Job.parse(job.to_wire(), OPENED, 64, 16) == job
    assert OpenTraining.parse(OPENED.to_wire()) == OPENED


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"blocks": [1, 5]}, "range within 2:6"),
        ({"blocks": [3, 7]}, "range within 2:6"),
        ({"blocks": [3, 3]}, "range within 2:6"),
        ({"blocks": []}, "range within 2:6"),
        ({"blocks": [3]}, "range within 2:6"),
        ({"blocks": [3, 4, 5]}, "too long"),
        ({"lengths": []}, "none, empty, or over 64"),
        ({"lengths": [4, 0]}, "none, empty, or over 64"),
        ({"lengths": [16] * 5}, "none, empty, or over 64"),
        ({"lengths": [1] * 65}, "too long"),
        ({"lengths": [17]}, "from 0 to 16"),
        ({"lengths": [-1]}, "from 0 to 16"),
        ({"lengths": "ab"}, "list"),
        ({"id": 0}, "whole number"),
        ({"id": True}, "whole number"),
        ({"version": -1}, "whole number"),
    ],
)
def test_jobs_that_are_none(change, why):
    with pytest.raises(BadMessage, match=why):
        Job.parse(Job("forward", 1, 3, 5, (4,), 0).to_wire() | change, OPENED, 64, 16)
