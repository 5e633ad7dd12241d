"""The published rule, which is the baseline."""

import random

from petalnode.routing.paper_rule import choose_start, should_move

from .records import record


def test_a_newcomer_takes_the_window_with_the_least_sorted_vector() -> None:
    swarm = [record("a", 0, 3), record("b", 3, 6, decode_tps=5.0), record("c", 3, 4)]
    assert choose_start(swarm, 6, 3) == 3
    assert choose_start(swarm, 6, 2) == 4
    assert choose_start([], 6, 2) == 0


def test_everybody_who_could_mend_it_decides_to_move_at_once() -> None:
    swarm = [record(f"p{i}", 0, 4) for i in range(5)] + [record("z", 4, 8)]
    movers = [a.peer_id for a in swarm if should_move(a.peer_id, swarm, 8, random.Random(0))]
    assert movers == ["p0", "p1", "p2", "p3", "p4"]  # the herd that rebalance avoids


def test_a_swarm_above_the_quality_is_left_alone() -> None:
    swarm = [record(f"p{i}", 0, 4) for i in range(4)] + [record(f"q{i}", 4, 8) for i in range(4)]
    assert not any(should_move(a.peer_id, swarm, 8, random.Random(0)) for a in swarm)
    assert not any(should_move(a.peer_id, swarm[1:], 8, random.Random(0)) for a in swarm[1:])


def test_the_only_server_of_a_block_stays() -> None:
    swarm = [record("a", 0, 4), record("b", 4, 8), record("c", 4, 8), record("d", 4, 8)]
    assert not should_move("a", swarm, 8, random.Random(0))
    assert should_move("b", swarm, 8, random.Random(0))
