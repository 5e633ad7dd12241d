"""What placements carry, against the linear programs that define it."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnode.routing.announcement import Announcement
from petalnode.routing.capacity import (
    BELIEVED,
    Board,
    Seat,
    Seating,
    Trials,
    bound,
    seats,
)
from petalnode.routing.placement import best_window, choose_window
from petalnode.routing.rebalance import best_moves, plan_moves

from .records import record, swarm_throughput

BLOCKS = 6
windows = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.integers(1, 20))
swarms = st.lists(windows, min_size=1, max_size=8)


def seated(swarm: list[tuple[int, int, int]]) -> list[Seat]:
    return [
        Seat(f"p{i}", start, min(start + size, BLOCKS), float(rate))
        for i, (start, size, rate) in enumerate(swarm)
    ]


def cut_capacity(taken: list[Seat]) -> float:
    """Hall's condition by brute force: no set of blocks gets more than its peers have."""
    return min(
        sum(s.rate for s in taken if any(chosen >> b & 1 for b in range(s.start, s.end)))
        / chosen.bit_count()
        for chosen in range(1, 1 << BLOCKS)
    )


@given(swarms)
def test_throughput_is_the_least_cut(swarm: list[tuple[int, int, int]]) -> None:
    taken = seated(swarm)
    assert swarm_throughput(taken, BLOCKS) == pytest.approx(cut_capacity(taken), rel=1e-5)


@given(swarms, windows)
def test_a_trial_says_what_putting_the_peer_there_gives(
    swarm: list[tuple[int, int, int]], extra: tuple[int, int, int]
) -> None:
    taken = seated(swarm)
    [peer] = seated([extra])
    trial = Trials(Board(taken, BLOCKS), 5.0).with_peer(peer.start, peer.end, peer.rate)
    assert trial == pytest.approx(Board([*taken, peer], BLOCKS).shortfall(5.0), abs=1e-5)


@given(swarms, st.integers(0, 7))
def test_taking_a_peer_off_the_board_undoes_putting_it_there(
    swarm: list[tuple[int, int, int]], which: int
) -> None:
    taken = seated(swarm)
    gone = taken[which % len(taken)]
    board = Board(taken, BLOCKS)
    board.take(gone.start, gone.end, gone.rate)
    rest = Board([seat for seat in taken if seat is not gone], BLOCKS)
    assert board.replicas == rest.replicas
    assert board.shortfall(5.0) == rest.shortfall(5.0)


@given(swarms, st.integers(0, 7))
def test_after_a_change_only_what_changed_is_swept_again(
    swarm: list[tuple[int, int, int]], which: int
) -> None:
    taken = seated(swarm)
    gone = taken[which % len(taken)]
    board = Board(taken, BLOCKS)
    trials = Trials(board, 5.0)
    board.take(gone.start, gone.end, gone.rate)
    assert trials.anew(gone.start, gone.end) == pytest.approx(board.shortfall(5.0), abs=1e-5)
    board.put(gone.start, gone.end, gone.rate)
    assert trials.anew(gone.start, gone.end) == pytest.approx(trials.missing, abs=1e-5)


@given(swarms)
def test_no_placement_exceeds_the_bound(swarm: list[tuple[int, int, int]]) -> None:
    taken = seated(swarm)
    best = bound([(seat.size, seat.rate) for seat in taken], BLOCKS)
    assert cut_capacity(taken) <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([(6, 12.0)], 2.0),
        ([(3, 12.0), (3, 12.0)], 4.0),
        # The fast one fits one block: it can give that block no more than the others give theirs.
        ([(1, 1000.0), (5, 10.0)], 2.0),
        ([(2, 100.0), (3, 100.0)], 0.0),  # six blocks do not fit
    ],
)
def test_the_bound_by_hand(nodes: list[tuple[int, float]], expected: float) -> None:
    assert bound(nodes, BLOCKS) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 50)), min_size=1, max_size=9))
def test_the_bound_is_that_of_a_real_solver(nodes: list[tuple[int, int]]) -> None:
    optimum = pytest.importorskip("benchmarks.optimum", reason="scipy is not installed")
    solved = optimum.solved_bound(nodes, BLOCKS)
    assert bound(nodes, BLOCKS) == pytest.approx(solved, rel=1e-6)


@given(swarms)
def test_throughput_is_that_of_a_real_solver(swarm: list[tuple[int, int, int]]) -> None:
    optimum = pytest.importorskip("benchmarks.optimum", reason="scipy is not installed")
    taken = seated(swarm)
    solved = optimum.solved_throughput(taken, BLOCKS)
    assert swarm_throughput(taken, BLOCKS) == pytest.approx(solved, rel=1e-5, abs=1e-5)


def test_who_counts_and_where() -> None:
    records = [
        record("a", 0, 2, decode_tps=5.0),
        record("b", 0, 2, state="joining"),
        record("c", 0, 2, state="draining"),
        record("d", 0, 2, state="draining", moving_to=(3, 5)),
        record("e", 4, 9, pinned=True),
        record("f", 0, 2, state="offline"),
    ]
    assert [(s.peer_id, s.start, s.end, s.status) for s in seats(records, BLOCKS)] == [
        ("a", 0, 2, "still"),
        ("b", 0, 2, "joining"),
        ("d", 3, 5, "moving"),
        ("e", 4, 6, "pinned"),
    ]
    assert seats(records, BLOCKS)[0].rate == 10.0


news = st.tuples(
    st.integers(0, 11),  # who
    windows,
    st.sampled_from(["online", "online", "joining", "draining", "offline"]),
    st.sampled_from([None, None, (0, 3)]),  # where it moves
    st.sampled_from([1.0, 1.0, 1e6]),  # how much it boasts
)


@given(st.lists(news, max_size=40), st.sets(st.integers(0, 11), max_size=3), windows)
def test_choices_are_the_same_however_the_news_came(
    heard: list[Any], passed: set[int], own: tuple[int, int, int]
) -> None:
    """One by one, with choices in between, or all at once."""
    seating = Seating((), BLOCKS)
    known: dict[str, Announcement] = {}
    names = {f"p{who:02d}" for who in passed}
    for who, (start, size, rate), state, moving_to, boast in heard:
        end = min(start + size, BLOCKS)
        said = record(
            f"p{who:02d}", start, end, state=state, moving_to=moving_to, decode_tps=rate * boast
        )
        known[said.peer_id] = said
        seating.update(said)
        best_moves(seating, names)
    anew = Seating(known.values(), BLOCKS)
    assert (seating.seats, seating.serving) == (anew.seats, anew.serving)
    assert seating.board.replicas == anew.board.replicas
    assert (
        seating.bound()
        == anew.bound()
        == pytest.approx(bound([(seat.size, seat.rate) for seat in anew.seats.values()], BLOCKS))
    )
    _, size, rate = own
    assert best_window(seating, size, float(rate)) == choose_window(
        known.values(), BLOCKS, size, float(rate)
    )
    assert best_moves(seating, names) == plan_moves(known.values(), BLOCKS, passed=names)


def test_who_is_believed_depends_on_the_others_that_are_there() -> None:
    seating = Seating([record("a", 0, 2, decode_tps=1.0)], BLOCKS)
    seating.update(record("b", 0, 2, decode_tps=1e6))
    assert seating.seats["b"].rate == BELIEVED * 2.0
    seating.update(record("c", 0, 2, decode_tps=1e6))
    assert seating.seats["b"].rate == 2e6
    seating.drop("a")
    seating.drop("c")
    assert seating.seats["b"].rate == 2e6
    assert seating.board.shortfall(1e6) == 4e6


def test_a_seating_of_hundreds_chooses_as_one_made_anew() -> None:
    chance, seating = Random(3), Seating((), 40)
    known: dict[str, Announcement] = {}
    for number in range(700):
        size, rate = chance.choice([1, 2, 5, 9]), chance.lognormvariate(4.0, 1.5)
        start = chance.randint(0, 40 - size)
        said = record(f"p{number % 500:04d}", start, start + size, decode_tps=rate)
        known[said.peer_id] = said
        seating.update(said)
    for size in (2, 7):
        assert best_window(seating, size, 99.0) == choose_window(known.values(), 40, size, 99.0)
    assert best_moves(seating) == plan_moves(known.values(), 40) != ()
