import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.routing.placement import block_throughput, choose_window

from .records import record


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


def test_a_window_larger_than_the_model_is_the_model() -> None:
    assert choose_window([], 4, 100) == (0, 4)


def test_the_order_of_records_does_not_matter() -> None:
    speeds = [0.1, 0.2, 0.3, 1e7]
    swarm = [record(f"p{i}", 0, 1, decode_tps=speed) for i, speed in enumerate(speeds)]
    sums = {block_throughput(order, 1)[0] for order in itertools.permutations(swarm)}
    assert len(sums) == 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spans=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=6),
    size=st.integers(1, 10),
)
def test_no_window_has_a_lesser_vector(spans: list[tuple[int, int]], size: int) -> None:
    swarm = [record(f"p{i}", a, min(a + n, 8)) for i, (a, n) in enumerate(spans)]
    weights = block_throughput(swarm, 8)
    start, end = choose_window(swarm, 8, size)
    assert end - start == min(size, 8)
    chosen = sorted(weights[start:end])
    assert all(chosen <= sorted(weights[s : s + end - start]) for s in range(8 - (end - start) + 1))
