"""Who moves, who does not, and when."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnode.routing.announcement import Announcement
from petalnode.routing.capacity import seats
from petalnode.routing.rebalance import (
    CONFIRM_S,
    MAX_MOVING_SHARE,
    PATIENCE_HOLE_S,
    PATIENCE_S,
    STUCK_S,
    Move,
    Rebalancer,
    plan_moves,
)

from .records import record, swarm_throughput


class Deciding:
    """One node that decides for itself."""

    def __init__(self, peer_id: str) -> None:
        self.mind = Rebalancer({peer_id}, 8, random.Random(1))

    def check(self, swarm: list[Announcement], now: float) -> Move | None:
        return next(iter(self.mind.check(swarm, now)), None)


UNEVEN = [record("a", 0, 4), record("b", 0, 4), record("c", 0, 4), record("d", 4, 8)]


def test_the_one_whose_move_gains_most_goes_and_nobody_else() -> None:
    # Blocks 2 to 5 are enough: d then gives all it has to blocks 6 and 7. Half the loading.
    assert plan_moves(UNEVEN, 8) == (Move("a", 2, 6, 2),)


def test_of_equal_gains_the_one_that_loads_less_is_taken() -> None:
    mirrored = [replace(a, start=8 - a.end, end=8 - a.start) for a in UNEVEN]
    assert plan_moves(mirrored, 8) == (Move("a", 2, 6, 2),)


def test_all_see_the_same_list_in_whatever_order_records_came() -> None:
    plans = {plan_moves(random.Random(i).sample(UNEVEN, 4), 8) for i in range(8)}
    assert len(plans) == 1


def test_a_balanced_swarm_is_left_alone() -> None:
    swarm = [record(f"{k}{start}", start, start + 4) for k in "abc" for start in (0, 4)]
    assert plan_moves(swarm, 8) == ()


def test_a_hole_is_filled_by_who_can_be_spared() -> None:
    swarm = [record("a", 0, 4), record("b", 0, 2), record("c", 4, 6)]
    assert plan_moves(swarm, 8) == (Move("b", 6, 8, 2, urgent=True),)


def test_a_hole_comes_before_a_larger_gain_elsewhere() -> None:
    swarm = [record(f"f{i}", 0, 2, decode_tps=50.0) for i in range(3)]
    swarm += [record("m", 2, 4, decode_tps=1.0), record("p", 4, 5, decode_tps=1000.0)]
    assert plan_moves(swarm, 6) == (Move("f0", 4, 6, 2, urgent=True),)


def test_a_peer_that_claims_the_speed_of_thousands_draws_nobody_away() -> None:
    swarm = {f"h{i:02d}": record(f"h{i:02d}", 4 * (i % 2), 4 * (i % 2) + 4) for i in range(20)}
    liar = record("liar", 0, 4, decode_tps=1e8)
    before = swarm_throughput(seats(swarm.values(), 8), 8)
    for _ in range(40):
        for move in plan_moves([*swarm.values(), liar], 8):
            if move.peer_id in swarm:
                swarm[move.peer_id] = replace(swarm[move.peer_id], start=move.start, end=move.end)
            else:
                liar = replace(liar, start=move.start, end=move.end)
    # Without the liar, who may compute nothing at all: it was 10 % of what all others carry.
    assert swarm_throughput(seats(swarm.values(), 8), 8) >= 0.8 * before


def test_nobody_leaves_a_hole_behind() -> None:
    assert plan_moves([record("a", 0, 4), record("b", 4, 6)], 8) == ()


def test_a_shift_is_not_asked_of_the_only_one_who_serves_a_block_that_it_keeps() -> None:
    # b could take blocks 3 to 5 and keep block 3, but while it drained nobody would serve that.
    swarm = [record("a", 0, 3), record("b", 1, 4), record("c", 4, 6, decode_tps=1.0)]
    assert all(move.peer_id != "b" for move in plan_moves(swarm, 6))
    joining = record("d", 1, 4, state="joining")
    assert all(move.peer_id != "b" for move in plan_moves([*swarm, joining], 6))


def test_who_could_not_drain_lets_others_go_first() -> None:
    node = Deciding("a")
    assert node.check(UNEVEN, 100.0) is None
    assert node.check(UNEVEN, 110.0) is not None
    node.mind.gave_up("a", 110.0)
    assert [node.check(UNEVEN, 110.0 + t) for t in range(1, 60, 5)] == [None] * 12


THREE = [record(peer, 0, 4) for peer in "abc"]  # blocks 4 to 7 are held by nobody


def test_for_a_hole_each_has_its_turn_within_seconds() -> None:
    node, at = Deciding("c"), 0.0
    for _ in range(2):  # a, then b: they could, and do nothing
        assert node.check(THREE, at) is None
        assert node.check(THREE, at + PATIENCE_HOLE_S - 0.1) is None
        at += PATIENCE_HOLE_S
    assert node.check(THREE, at) is None
    assert node.mind.passed == {"a", "b"}
    assert node.check(THREE, at + 2.0) == Move("c", 4, 8, 4, urgent=True)


def test_patience_for_a_hole_begins_with_the_hole() -> None:
    node = Deciding("b")
    assert node.check(UNEVEN, 0.0) is None  # a is on the list, and in no hurry
    assert node.check(UNEVEN[:3], PATIENCE_HOLE_S) is None
    assert node.check(UNEVEN[:3], PATIENCE_HOLE_S + 1) is None
    assert node.mind.passed == set()


def test_who_would_rather_not_goes_only_if_nobody_else_does() -> None:
    node = Deciding("a")
    assert node.check(THREE, 0.0) is None
    move = node.check(THREE, 2.0)
    assert move is not None
    node.mind.others_first(move)
    seen = [node.check(THREE, 2.0 + t) for t in range(1, 20)]
    at = 2.0 + 1 + seen.index(move)
    assert 2 * PATIENCE_HOLE_S <= at - 2.0 <= 2 * PATIENCE_HOLE_S + 4
    assert node.mind.passed == {"b", "c"}


def test_who_would_rather_not_is_asked_at_once_where_there_are_no_others() -> None:
    node = Deciding("a")
    alone = [THREE[0], record("b", 0, 4, pinned=True)]
    assert node.check(alone, 0.0) is None
    move = node.check(alone, 2.0)
    assert move is not None
    node.mind.others_first(move)
    assert node.check(alone, 3.0) == move


def test_a_shift_that_keeps_blocks_beats_one_that_loads_all() -> None:
    # d could fill blocks 6 and 7, too; but b then gives blocks 4 and 5 what they lack as well.
    swarm = [record("a", 0, 4), record("b", 2, 6), record("c", 0, 4), record("d", 4, 6)]
    assert plan_moves([*swarm, record("e", 2, 6)], 8) == (Move("b", 4, 8, 2, urgent=True),)


@pytest.mark.parametrize("change", [{"pinned": True}, {"state": "joining"}])
def test_who_is_not_asked(change: dict[str, object]) -> None:
    swarm = [replace(a, **change) if a.peer_id in "abc" else a for a in UNEVEN]
    assert plan_moves(swarm, 8) == ()


def test_a_mover_counts_where_it_will_be_and_holds_the_others_back() -> None:
    moving = replace(UNEVEN[0], state="draining", moving_to=(0, 3))
    assert plan_moves([moving, *UNEVEN[1:]], 8) == ()


def test_while_many_newcomers_load_nobody_moves() -> None:
    newcomers = [record(f"n{i}", 4, 6, state="joining", decode_tps=0.1) for i in range(3)]
    assert plan_moves(UNEVEN, 8) != ()
    assert plan_moves(UNEVEN + newcomers, 8) == ()


def test_in_balance_a_second_copy_is_made_of_what_has_one() -> None:
    # One strong peer carries block 4 alone; three weak ones crowd on blocks 0 to 4.
    swarm = [record("a", 0, 4, decode_tps=100.0), record("b", 4, 5, decode_tps=100.0)]
    swarm += [record(f"w{i}", 0, 2, decode_tps=0.1) for i in range(3)]
    [move] = plan_moves(swarm, 5)
    assert move.peer_id.startswith("w")
    assert move.end == 5 or move.start == 2


peers = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 5), st.floats(1.0, 30.0)), min_size=3, max_size=9
)


def swarm_of(drawn: list[tuple[int, int, float]]) -> list[Announcement]:
    return [
        record(f"p{i}", min(a, 8 - n), min(a, 8 - n) + n, decode_tps=tps)
        for i, (a, n, tps) in enumerate(drawn)
    ]


@given(peers)
def test_moves_end_and_never_make_it_worse(drawn: list[tuple[int, int, float]]) -> None:
    swarm = {a.peer_id: a for a in swarm_of(drawn)}
    covered = {b for a in swarm.values() for b in range(a.start, a.end)}
    before = swarm_throughput(seats(swarm.values(), 8), 8)
    for _ in range(60):
        moves = plan_moves(list(swarm.values()), 8)
        if not moves:
            break
        for m in moves:
            assert (m.end - m.start) == (swarm[m.peer_id].end - swarm[m.peer_id].start)
            swarm[m.peer_id] = replace(swarm[m.peer_id], start=m.start, end=m.end)
    else:
        pytest.fail("the swarm never came to rest")
    covered_after = {b for a in swarm.values() for b in range(a.start, a.end)}
    if len(covered) < 8:  # nothing is served with a hole: only how many blocks are held counts
        assert len(covered_after) >= len(covered)
        return
    assert covered_after == covered
    after = swarm_throughput(seats(swarm.values(), 8), 8)
    assert after >= 0.95 * before  # what is missing never grows, and it bounds the weakest block


def test_one_in_a_hundred_moves_at_once() -> None:
    swarm = [record(f"p{i:03d}", 0, 4) for i in range(300)] + [record("z", 4, 8)]
    assert len(plan_moves(swarm, 8)) == int(301 * MAX_MOVING_SHARE)


def test_a_node_on_the_list_looks_again_before_it_goes() -> None:
    node = Deciding("a")
    assert node.check(UNEVEN, 100.0) is None
    assert node.check(UNEVEN, 100.0 + CONFIRM_S - 0.1) is None
    assert node.check(UNEVEN, 100.0 + 2 * CONFIRM_S) == Move("a", 2, 6, 2)


def test_news_in_the_meantime_call_the_move_off() -> None:
    node = Deciding("a")
    assert node.check(UNEVEN, 100.0) is None
    filled = [*UNEVEN, record("e", 4, 8), record("f", 4, 8)]
    assert node.check(filled, 101.0) is None
    assert node.check(UNEVEN, 110.0) is None  # it waits anew
    assert node.check(UNEVEN, 110.0 + 2 * CONFIRM_S) is not None


def test_those_not_on_the_list_stay() -> None:
    node = Deciding("b")
    assert [node.check(UNEVEN, float(t)) for t in range(20)] == [None] * 20


def test_a_peer_on_the_list_that_does_not_move_is_passed_over() -> None:
    node = Deciding("b")
    assert node.check(UNEVEN, 0.0) is None
    assert node.check(UNEVEN, PATIENCE_S) is None  # from now on a is passed over
    assert node.check(UNEVEN, PATIENCE_S + 2 * CONFIRM_S) == Move("b", 2, 6, 2)


def test_a_peer_that_never_arrives_does_not_hold_the_others_back_for_ever() -> None:
    node = Deciding("b")
    swarm = [*UNEVEN[1:], record("e", 0, 4), record("x", 0, 1, moving_to=(1, 2), decode_tps=0.1)]
    assert node.check(swarm, 0.0) is None
    assert node.check(swarm, STUCK_S - 1) is None
    assert node.check(swarm, STUCK_S) is None
    assert node.check(swarm, STUCK_S + 2 * CONFIRM_S) == Move("b", 2, 6, 2)


@pytest.mark.parametrize("changes", [{"moving_to": (4, 8)}, {}])
def test_a_hole_is_not_left_for_ever_to_one_that_never_arrives(changes: dict[str, object]) -> None:
    swarm = [record(p, 0, 4) for p in "abc"] + [record("x", 4, 8, state="joining", **changes)]
    node = Deciding("a")
    node.check(swarm, 0.0)
    node.check(swarm, STUCK_S)
    move = node.check(swarm, STUCK_S + 2 * CONFIRM_S)
    assert move == Move("a", 4, 8, 4, urgent=True)


def test_one_passed_over_that_moves_after_all_is_counted_on() -> None:
    swarm = [record(p, 0, 4) for p in "abc"]
    node = Deciding("b")
    assert node.check(swarm, 0.0) is None
    assert node.check(swarm, PATIENCE_S) is None  # a is passed over
    swarm[0] = record("a", 0, 4, state="draining", moving_to=(4, 8))
    late = [node.check(swarm, PATIENCE_S + 1 + k) for k in range(20)]
    assert late == [None] * 20


@pytest.mark.parametrize(
    "others",
    [
        [record("x", 0, 4, state="joining", moving_to=(0, 4))],
        [record(f"x{k}", 0, 4, state="joining") for k in range(3)],
    ],
)
def test_a_hole_does_not_wait_for_those_who_move_or_join_elsewhere(
    others: list[Announcement],
) -> None:
    swarm = [record(p, 0, 4) for p in "abc"]
    assert plan_moves(swarm + others, 8) == (Move("a", 4, 8, 4, urgent=True),)
    to_hole = [record(f"y{k}", 0, 4, state="draining", moving_to=(k, k + 4)) for k in (1, 2)]
    assert plan_moves(swarm + others + to_hole, 8) == ()  # as many again, and no more


def test_while_there_is_a_hole_one_that_cannot_be_spared_fills_it_if_it_gives_up_less() -> None:
    """Both hold blocks that nobody else holds, but with the hole nothing is served anyway."""
    swarm = [record("b", 4, 8), record("c", 2, 6)]
    (move,) = plan_moves(swarm, 8)
    assert (move.peer_id, move.start, move.end, move.urgent) == ("c", 0, 4, True)
    assert plan_moves([record("b", 5, 8), record("c", 2, 5)], 9) == ()
