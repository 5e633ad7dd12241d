import random
from typing import Any

from petalnode.routing.announcement import MAX_CLOCK_SKEW_S
from petalnode.routing.view import Outcome, Sighting, SwarmView

from .records import record


def put(view: SwarmView, peer_id: str = "alice", *, now: float = 0.0, **changes: Any) -> Outcome:
    a = record(peer_id, **changes)
    return view.apply(a, now, f"{peer_id}{a.seq}".encode())


def names(view: SwarmView, now: float = 0.0) -> list[str]:
    return [a.peer_id for a in view.live(now)]


def test_the_highest_sequence_number_wins() -> None:
    view = SwarmView()
    assert put(view, seq=5) == "new"
    assert put(view, seq=5) == "duplicate"
    assert put(view, seq=4) == "stale"
    assert view.apply(record(seq=5, queue_depth=9), 0.0, b"another with the same seq") == "stale"
    assert put(view, seq=6, queue_depth=3) == "updated"
    assert [a.queue_depth for a in view.live(0.0)] == [3]


def test_a_record_lives_for_its_ttl_on_our_clock() -> None:
    view = SwarmView()
    put(view, now=100.0, ttl_s=30.0)
    assert names(view, 129.9) == ["alice"]
    assert names(view, 130.0) == []
    assert view.get("alice", 129.9) is not None
    assert view.get("alice", 130.0) is None
    assert view.expire(129.9) == []
    assert view.expire(130.0) == ["alice"]
    assert view.expire(131.0) == []


def test_a_duplicate_does_not_prolong_a_life() -> None:
    view = SwarmView()
    put(view, now=0.0, ttl_s=30.0)
    assert put(view, now=20.0, ttl_s=30.0) == "duplicate"
    assert names(view, 31.0) == []


def test_a_record_passed_on_keeps_its_age() -> None:
    view = SwarmView()
    assert view.apply(record(ttl_s=30.0), 100.0, b"a", age_s=20.0) == "new"
    assert view.snapshot(105.0) == [Sighting(b"a", 25.0)]
    assert names(view, 109.0) == ["alice"]
    assert names(view, 110.0) == []
    assert view.apply(record("bob", ttl_s=30.0), 100.0, b"b", age_s=30.0) == "expired"
    assert view.apply(record("carol", ttl_s=30.0), 100.0, b"c", age_s=-50.0) == "new"
    assert names(view, 130.0) == []


def test_goodbye_is_at_once_and_final() -> None:
    view = SwarmView()
    put(view, seq=1)
    assert put(view, seq=3, state="offline") == "goodbye"
    assert names(view) == []
    assert put(view, seq=2) == "stale"
    assert put(view, seq=3, state="offline") == "duplicate"
    assert names(view) == []
    assert put(view, seq=4) == "new"
    assert names(view) == ["alice"]


def test_a_tombstone_lasts_until_no_replay_can_pass_the_clock_check() -> None:
    view = SwarmView()
    put(view, seq=2, ttl_s=30.0, state="offline")
    last = 30.0 + 2 * MAX_CLOCK_SKEW_S
    view.expire(last - 1)
    assert put(view, seq=1, now=last - 1) == "stale"
    view.expire(last)
    assert put(view, seq=1, now=last) == "new"


def test_a_forgotten_peer_comes_back_by_a_newer_record_only() -> None:
    view = SwarmView()
    put(view, seq=1)
    assert view.forget("alice")
    assert not view.forget("alice")
    assert not view.forget("nobody")
    assert put(view, seq=1) == "duplicate"
    assert names(view) == []
    assert put(view, seq=2) == "new"


def test_spans_beyond_the_model_are_refused() -> None:
    view = SwarmView(num_blocks=4)
    assert put(view, end=5) == "span"
    assert put(view, moving_to=(3, 5)) == "span"
    assert put(view, end=4) == "new"


def test_the_number_of_peers_is_bounded_and_the_dead_make_room() -> None:
    view = SwarmView(max_peers=2)
    put(view, "alice")
    put(view, "bob", state="offline")
    assert put(view, "carol") == "new"
    view.prove("alice")
    view.prove("carol")
    assert put(view, "dave") == "full"
    assert put(view, "alice", seq=2) == "updated"
    assert names(view) == ["alice", "carol"]


def test_those_who_are_forgotten_make_room() -> None:
    view = SwarmView(max_peers=2)
    for name in ("alice", "bob"):
        view.prove(name)
        put(view, name, ttl_s=30.0)
    last = 30.0 + 2 * MAX_CLOCK_SKEW_S
    assert put(view, "carol", now=last) == "new"
    assert put(view, "dave", now=last) == "new"
    assert names(view, last) == ["carol", "dave"]


def test_a_flood_of_newcomers_pushes_out_newcomers() -> None:
    view = SwarmView(max_peers=20, rng=random.Random(1))
    view.prove("own")
    for i in range(9):
        put(view, f"old{i}")
    put(view, "own")
    put(view, "used")
    view.prove("used")
    for i in range(500):
        assert put(view, f"fake{i}") == "new"
    left = names(view)
    assert len(left) == 20
    assert {"own", "used", *(f"old{i}" for i in range(9))} <= set(left)
    # Who comes now is seen for a while too, and may be proven meanwhile.
    assert put(view, "honest") == "new"
    view.prove("honest")
    for i in range(500):
        put(view, f"more{i}")
    assert "honest" in names(view)


def test_a_flood_of_goodbyes_leaves_the_living_alone() -> None:
    view = SwarmView(max_peers=10, rng=random.Random(1))
    for i in range(5):
        put(view, f"old{i}")
    for i in range(100):
        put(view, f"fake{i}", state="offline")
    assert names(view) == [f"old{i}" for i in range(5)]
    assert put(view, "honest") == "new"


def test_tenure_counts_from_when_a_peer_came_to_stay() -> None:
    view = SwarmView()
    assert view.since("alice", 0.0) is None
    put(view, now=1.0)
    put(view, now=5.0, seq=2)
    assert view.since("alice", 6.0) == 1.0
    assert view.since("alice", 99.0) is None
    put(view, now=7.0, seq=3, state="offline")
    assert view.since("alice", 7.0) is None
    put(view, now=9.0, seq=4)
    assert view.since("alice", 9.0) == 9.0


def test_coverage_counts_those_who_are_online() -> None:
    view = SwarmView(num_blocks=6)
    put(view, "alice", start=0, end=3)
    put(view, "bob", start=2, end=4)
    put(view, "carol", start=4, end=6, state="joining")
    assert view.coverage(0.0) == [1, 1, 2, 1, 0, 0]
    assert view.missing(0.0) == (4, 5)
    assert SwarmView().coverage(0.0) == []


def test_snapshot_has_the_living_freshest_first() -> None:
    view = SwarmView()
    put(view, "alice", now=1.0)
    put(view, "bob", now=3.0)
    put(view, "carol", now=2.0, state="offline")
    assert view.snapshot(4.0) == [Sighting(b"bob1", 1.0), Sighting(b"alice1", 3.0)]


def test_changes_are_told() -> None:
    view = SwarmView()
    told: list[int] = []
    view.on_change = lambda: told.append(view.version)
    put(view, seq=1)
    put(view, seq=1)
    put(view, seq=2)
    view.forget("alice")
    put(view, seq=3, now=0.0)
    view.expire(1000.0)
    assert told == [1, 2, 3, 4, 5]


def test_who_was_forgotten_too_soon_may_come_back_while_its_record_counts() -> None:
    view = SwarmView()
    view.apply(record("alice", ttl_s=30.0), 0.0, b"1")
    assert view.forget("alice")
    version = view.version
    assert view.would_live("alice", 29.0)
    assert view.revive("alice", 29.0)
    assert view.get("alice", 29.0) is not None
    assert view.version == version + 1
    assert view.revive("alice", 29.0)  # it lives already
    assert view.version == version + 1
    assert not view.revive("alice", 30.0)
    assert not view.revive("nobody", 0.0)


def test_nobody_comes_back_from_a_goodbye() -> None:
    view = SwarmView()
    view.apply(record("alice", ttl_s=30.0), 0.0, b"1")
    view.apply(record("alice", ttl_s=30.0, seq=2, state="offline"), 1.0, b"2")
    assert not view.revive("alice", 2.0)
    assert view.get("alice", 2.0) is None


def test_whom_this_node_reached_is_known() -> None:
    view = SwarmView()
    view.apply(record("alice", ttl_s=30.0), 0.0, b"1")
    assert not view.is_proven("alice")
    view.prove("alice")
    assert view.is_proven("alice")
