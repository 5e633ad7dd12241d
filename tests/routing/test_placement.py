import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.routing.capacity import Board, seats
from petalnode.routing.placement import block_throughput, choose_window

from .records import record, swarm_throughput


def test_an_empty_swarm_is_filled_from_the_start() -> None:
    assert choose_window([], 8, 3) == (0, 3)


def test_a_hole_is_filled_first() -> None:
    swarm = [record("a", 0, 3), record("b", 5, 8)]
    assert choose_window(swarm, 8, 2) == (3, 5)


def test_the_weakest_block_counts_before_the_sum() -> None:
    swarm = [
        record("a", 0, 2, decode_tps=5.0),
        record("b", 2, 3, decode_tps=1.0),
        record("c", 3, 4, decode_tps=100.0),
    ]
    assert choose_window(swarm, 4, 2) == (1, 3)


def test_nodes_that_join_one_after_another_cover_the_model() -> None:
    swarm = []
    for i, state in enumerate(["joining"] * 4):
        start, end = choose_window(swarm, 8, 2)
        swarm.append(record(f"p{i}", start, end, state=state))
    assert sorted((a.start, a.end) for a in swarm) == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_those_who_leave_do_not_count() -> None:
    swarm = [record("a", 0, 4, state="draining"), record("b", 4, 8)]
    assert choose_window(swarm, 8, 4) == (0, 4)


def test_those_who_move_count_where_they_will_be() -> None:
    swarm = [record("a", 0, 4, state="draining", moving_to=(4, 8)), record("b", 0, 4)]
    assert choose_window([*swarm, record("c", 0, 4)], 8, 4) == (4, 8)


def test_a_window_larger_than_the_model_is_the_model() -> None:
    assert choose_window([], 4, 100) == (0, 4)


def test_where_capacity_is_short_counts_more_than_an_even_split() -> None:
    # Split evenly, blocks 2 and 3 look weakest (16). But a can spend all of its 60 on them, and
    # c can leave more of its 34 to block 5 if somebody helps it with block 4.
    swarm = [record("a", 0, 4, decode_tps=15.0), record("b", 0, 2, decode_tps=15.0)]
    swarm += [record("c", 4, 6, decode_tps=17.0), record("d", 2, 4, decode_tps=1.0)]
    assert choose_window(swarm, 6, 2, rate=20.0) == (3, 5)


def test_seams_decide_where_capacity_does_not() -> None:
    # "all" can make up for everything, and blocks 2 to 5 are a hair weaker: but a chain over a
    # span that begins in the middle of others has one more hop.
    swarm = [record("all", 0, 8, decode_tps=100.0), record("b", 0, 4), record("c", 4, 8)]
    swarm += [record("d", 0, 2, decode_tps=0.01), record("e", 6, 8, decode_tps=0.01)]
    assert choose_window(swarm, 8, 4) == (0, 4)


def test_an_announced_window_is_kept_unless_another_is_clearly_better() -> None:
    swarm = [record("a", 0, 4)]
    assert choose_window(swarm, 4, 2, rate=20.0, current=(2, 4)) == (2, 4)
    swarm.append(record("b", 2, 4, decode_tps=100.0))
    assert choose_window(swarm, 4, 2, rate=20.0, current=(2, 4)) == (0, 2)


def test_the_order_of_records_does_not_matter() -> None:
    speeds = [0.1, 0.2, 0.3, 1e7]
    swarm = [record(f"p{i}", 0, 1, decode_tps=speed) for i, speed in enumerate(speeds)]
    orders = itertools.permutations(swarm)
    assert len({block_throughput(Board(seats(order, 1), 1))[0] for order in orders}) == 1


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    spans=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=6),
    size=st.integers(1, 8),
)
def test_no_window_fills_more_holes(spans: list[tuple[int, int]], size: int) -> None:
    swarm = [record(f"p{i}", a, min(a + n, 8)) for i, (a, n) in enumerate(spans)]
    start, end = choose_window(swarm, 8, size)
    assert end - start == size
    held = {block for a in swarm for block in range(a.start, a.end)}
    filled = [len(set(range(s, s + size)) - held) for s in range(8 - size + 1)]
    assert filled[start] == max(filled)


@given(joined=st.lists(st.tuples(st.integers(1, 4), st.floats(1.0, 9.0)), min_size=8, max_size=14))
def test_a_swarm_that_joins_one_by_one_carries_most_of_its_optimum(
    joined: list[tuple[int, float]],
) -> None:
    swarm = []
    for i, (size, rate) in enumerate(joined):
        start, end = choose_window(swarm, 6, size, rate)
        swarm.append(record(f"p{i:02d}", start, end, decode_tps=rate / size))
    # No placement carries more than all compute spread over all blocks.
    everything = sum(rate for _, rate in joined) / 6
    carried = swarm_throughput(seats(swarm, 6), 6)
    assert 0.0 <= carried <= everything * (1 + 1e-9)
    if sum(size for size, _ in joined) >= 12:
        assert carried > 0
