import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnode.routing.costs import VISIT_S, Columns, Knowledge, Workload, price, why_not

from .records import record


@settings(max_examples=200, deadline=None)
@given(
    state=st.sampled_from(["online", "draining"]),
    quant=st.sampled_from(["none", "nf4"]),
    max_context=st.sampled_from([99, 100, 101]),
    kv_tokens_free=st.sampled_from([0, 1, 24, 25, 26, 200]),
    adapters=st.sampled_from([(), ("a",), ("a", "b")]),
    known=st.sampled_from([Knowledge(), Knowledge(banned={"alice": "banned for 1 s more: x"})]),
    exclude=st.sampled_from([(), ("alice",), ("bob",)]),
    workload=st.builds(
        Workload,
        kv_tokens=st.sampled_from([0, 1, 100]),
        context=st.sampled_from([0, 100]),
        adapters=st.sampled_from([(), ("a",), ("b", "a")]),
        exact=st.booleans(),
    ),
)
def test_a_peer_is_out_of_the_question_exactly_if_there_is_a_reason(
    known: Knowledge, exclude: tuple[str, ...], workload: Workload, **fields: object
) -> None:
    a = record("alice", **fields)
    prices = price(Columns([a]), workload, known, exclude)
    assert np.isfinite(prices.enter[0]) == (why_not(a, workload, known, exclude) is None)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 4), (25, 4), (26, 3), (34, 2), (100, 1)])
def test_room_for_fewer_tokens_is_room_in_more_blocks(tokens: int, blocks: int) -> None:
    columns = Columns([record(kv_tokens_free=25)])
    assert price(columns, Workload(kv_tokens=tokens), Knowledge(), ()).cap.tolist() == [blocks]


def test_without_demands_only_the_visit_and_the_blocks_cost() -> None:
    columns = Columns([record(decode_tps=10.0, bandwidth=1.0)])
    prices = price(columns, Workload(), Knowledge(), ())
    assert prices.enter.tolist() == [VISIT_S]
    assert prices.leave.tolist() == [0.0]
    assert prices.block_s.tolist() == [1 / 40]
    assert price(Columns([]), Workload(kv_tokens=1), Knowledge(), ()).enter.shape == (0,)


def test_a_stage_is_as_busy_as_its_hop_or_its_link() -> None:
    columns = Columns([record("a", bandwidth=100.0), record("b", bandwidth=1e9)])
    prices = price(columns, Workload(token_bytes=10), Knowledge(), ())
    assert prices.stage_s(2).tolist() == pytest.approx([0.1, 0.05])
