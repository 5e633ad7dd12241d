import math

import pytest

from petalnode.routing import suspicion
from petalnode.routing.announcement import MAX_CLOCK_SKEW_S, InvalidAnnouncement
from petalnode.routing.suspicion import (
    CONFIRM_S,
    FADE_S,
    LIFE_S,
    MAX_OPEN,
    MAX_REFUTED,
    TENURE_S,
    Suspicion,
    Suspicions,
)
from petalnode.routing.view import SwarmView

from .records import WALL, record

NOW = TENURE_S + 1.0


def swarm(*names: str) -> SwarmView:
    view = SwarmView()
    for name in ("me", "victim", "w1", "w2", "w3", *names):
        add(view, name)
    return view


def add(view: SwarmView, name: str, seq: int = 1, now: float = 0.0) -> None:
    view.apply(record(name, seq=seq, ttl_s=10_000.0), now, f"{name}{seq}".encode())


def says(accuser: str, accused: str = "victim", seq: int = 1) -> Suspicion:
    return Suspicion(accuser, accused, seq, WALL)


def test_what_two_witnesses_say_and_nobody_refutes_is_true_after_a_while() -> None:
    cases = Suspicions("me", swarm())
    assert cases.hear(says("w1"), NOW) == "suspected"
    assert cases.hear(says("w2"), NOW + 1) == "suspected"
    assert cases.suspected(NOW + 1) == {"victim"}
    assert cases.dead(NOW + CONFIRM_S - 0.1) == []
    assert cases.dead(NOW + CONFIRM_S) == ["victim"]
    assert cases.dead(NOW + CONFIRM_S) == []


def test_one_witness_is_not_enough_however_often_it_speaks() -> None:
    cases = Suspicions("me", swarm())
    assert cases.hear(says("w1"), NOW) == "suspected"
    assert cases.hear(says("w1"), NOW + 1) == "known"
    assert cases.dead(NOW + CONFIRM_S + 1) == []
    assert cases.suspected(NOW + LIFE_S - 0.1) == {"victim"}
    assert cases.suspected(NOW + LIFE_S) == set()


def test_a_newer_record_refutes() -> None:
    view = swarm()
    cases = Suspicions("me", view)
    cases.hear(says("w1"), NOW)
    cases.hear(says("w2"), NOW)
    add(view, "victim", seq=2, now=NOW + CONFIRM_S - 1)
    assert cases.suspected(NOW + CONFIRM_S - 1) == set()
    assert cases.dead(NOW + CONFIRM_S) == []
    assert cases.hear(says("w3"), NOW + CONFIRM_S) == "refuted"
    assert cases.hear(says("w3", seq=2), NOW + CONFIRM_S) == "suspected"


def test_a_failed_probe_of_our_own_decides_and_is_told() -> None:
    cases = Suspicions("me", swarm())
    assert cases.probe_failed("victim", WALL, NOW) == says("me")
    assert cases.dead(NOW) == ["victim"]


def test_nothing_is_told_that_enough_others_said() -> None:
    cases = Suspicions("me", swarm())
    cases.hear(says("w1"), NOW)
    assert cases.probe_failed("victim", WALL, NOW) is not None
    cases = Suspicions("me", swarm())
    cases.hear(says("w1"), NOW)
    cases.hear(says("w2"), NOW)
    assert cases.probe_failed("victim", WALL, NOW) is None
    assert cases.dead(NOW) == ["victim"]
    assert cases.probe_failed("stranger", WALL, NOW) is None
    assert cases.probe_failed("me", WALL, NOW) is None


def test_a_probe_of_our_own_that_succeeds_outweighs_all_others() -> None:
    cases = Suspicions("me", swarm())
    for witness in ("w1", "w2", "w3"):
        cases.hear(says(witness), NOW)
    cases.probe_succeeded("victim", NOW)
    cases.probe_succeeded("nobody", NOW)
    assert cases.suspected(NOW) == set()
    assert cases.dead(NOW + CONFIRM_S) == []
    cases.probe_failed("victim", WALL, NOW + CONFIRM_S)
    assert cases.dead(NOW + CONFIRM_S) == ["victim"]


def test_whoever_was_seen_alive_may_die_afterwards() -> None:
    cases = Suspicions("me", swarm())
    for witness in ("w1", "w2"):
        cases.hear(says(witness), NOW)
    cases.probe_succeeded("victim", NOW + 1)
    assert cases.hear(says("w1"), NOW + CONFIRM_S) == "known"  # we looked since, and know better
    later = NOW + 1 + CONFIRM_S
    assert cases.hear(says("w1"), later) == "suspected"  # a reason to look again
    assert cases.suspected(later) == {"victim"}
    assert cases.dead(later + CONFIRM_S) == []
    assert cases.hear(says("w2"), later + 1) == "suspected"
    assert cases.dead(later + CONFIRM_S) == ["victim"]


def test_a_new_accuser_of_one_seen_long_ago_opens_the_case_anew() -> None:
    cases = Suspicions("me", swarm())
    cases.hear(says("w1"), NOW)
    cases.probe_succeeded("victim", NOW)
    assert cases.hear(says("w2"), NOW + CONFIRM_S) == "suspected"
    assert cases.suspected(NOW + CONFIRM_S) == {"victim"}
    assert cases.dead(NOW + CONFIRM_S) == []  # only now do they begin to wait for a refutation
    assert cases.dead(NOW + 2 * CONFIRM_S) == ["victim"]


def test_who_is_accused_answers_for_its_latest_record_however_soon_after_the_last_answer() -> None:
    view = swarm()
    cases = Suspicions("me", view)
    assert cases.hear(says("w1", "me"), NOW) == "refute"
    add(view, "me", seq=2, now=NOW)
    assert cases.hear(says("w2", "me"), NOW) == "refuted"
    # Two who accuse the refutation itself would else be believed: nothing else refutes them.
    assert cases.hear(says("w1", "me", seq=2), NOW + 0.1) == "refute"
    assert cases.hear(says("w2", "me", seq=2), NOW + 0.2) == "refute"
    assert cases.suspected(NOW + 1) == set()


def test_strangers_and_newcomers_have_no_voice() -> None:
    view = swarm()
    cases = Suspicions("me", view)
    assert cases.hear(says("nobody"), NOW) == "no voice"
    add(view, "fresh", now=NOW)
    assert cases.hear(says("fresh"), NOW + 1) == "no voice"
    assert cases.hear(says("w1", "nobody"), NOW) == "stranger"
    assert cases.suspected(NOW) == set()
    assert cases.hear(says("fresh"), NOW + TENURE_S) == "suspected"


def test_who_is_refuted_again_and_again_loses_its_voice_for_a_while() -> None:
    view = swarm()
    cases = Suspicions("me", view)
    for seq in range(1, MAX_REFUTED + 1):
        assert cases.hear(says("w1", seq=seq), NOW) == "suspected"
        add(view, "victim", seq=seq + 1, now=NOW)
    latest = says("w1", seq=MAX_REFUTED + 1)
    assert cases.hear(latest, NOW + 1) == "no voice"
    assert cases.hear(says("w2", seq=MAX_REFUTED + 1), NOW + 1) == "suspected"
    assert cases.hear(latest, NOW + FADE_S + 1) == "suspected"


def test_nobody_accuses_everybody() -> None:
    names = [f"p{i}" for i in range(MAX_OPEN + 1)]
    cases = Suspicions("me", swarm(*names))
    outcomes = [cases.hear(says("w1", name), NOW) for name in names]
    assert outcomes == ["suspected"] * MAX_OPEN + ["no voice"]


def test_the_number_of_cases_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspicion, "MAX_ACCUSED", 2)
    cases = Suspicions("me", swarm("a", "b"))
    assert cases.hear(says("w1", "a"), NOW) == "suspected"
    assert cases.hear(says("w2", "b"), NOW) == "suspected"
    assert cases.hear(says("w3"), NOW) == "full"
    assert cases.hear(says("w3", "a"), NOW) == "suspected"


def test_a_peer_that_left_the_view_has_no_case_any_more() -> None:
    view = swarm()
    cases = Suspicions("me", view)
    cases.hear(says("w1"), NOW)
    cases.hear(says("w2"), NOW)
    view.forget("victim")
    assert cases.suspected(NOW) == set()
    assert cases.dead(NOW + CONFIRM_S) == []


def test_survives_the_trip_through_plain_values() -> None:
    assert Suspicion.from_dict(says("w1").to_dict()) == says("w1")
    assert Suspicion.from_dict(says("w1").to_dict() | {"more": 1}) == says("w1")


@pytest.mark.parametrize(
    "changes",
    [
        {"accuser": "victim"},
        {"accuser": "not an id"},
        {"accused": 7},
        {"seq": 0},
        {"seq": 1.5},
        {"issued_at": math.nan},
        {"issued_at": None},
    ],
)
def test_garbage_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidAnnouncement):
        Suspicion.from_dict(says("w1").to_dict() | changes)


@pytest.mark.parametrize("plain", [None, [], {}, {"accuser": "w1"}, "text"])
def test_what_is_no_suspicion_is_refused(plain: object) -> None:
    with pytest.raises(InvalidAnnouncement) as caught:
        Suspicion.from_dict(plain)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("skew_s", [-30.0, 0.0, 30.0])
def test_clocks_thirty_seconds_apart_work(skew_s: float) -> None:
    says("w1").check_clock(WALL + skew_s)


@pytest.mark.parametrize(
    ("age_s", "reason"),
    [(-MAX_CLOCK_SKEW_S - 1, "future"), (LIFE_S + MAX_CLOCK_SKEW_S + 1, "expired")],
)
def test_the_clock_is_checked(age_s: float, reason: str) -> None:
    with pytest.raises(InvalidAnnouncement) as caught:
        says("w1").check_clock(WALL + age_s)
    assert caught.value.reason == reason
