import contextlib
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.routing.announcement import (
    MAX_CLOCK_SKEW_S,
    OPTIONAL,
    Announcement,
    InvalidAnnouncement,
    check_clock,
    refusal_kind,
    rtt_key,
)

from .records import WALL, record


def refused(**changes: Any) -> str:
    return refusal(**changes).reason


def refusal(**changes: Any) -> InvalidAnnouncement:
    with pytest.raises(InvalidAnnouncement) as caught:
        record(**changes)
    return caught.value


def test_survives_the_trip_through_plain_values() -> None:
    a = record(adapters=("org/lora",), rtts={"bob": 0.02}, bandwidth=1e6, moving_to=(4, 6))
    assert Announcement.from_dict(record().to_dict()) == record()
    assert Announcement.from_dict(a.to_dict()) == a


def test_unknown_fields_of_newer_versions_are_ignored() -> None:
    a = record()
    assert Announcement.from_dict(a.to_dict() | {"shoe_size": 43}) == a


@pytest.mark.parametrize("name", sorted(record().to_dict()))
def test_every_field_but_the_optional_ones_must_be_there(name: str) -> None:
    plain = record().to_dict()
    assert name not in OPTIONAL
    with pytest.raises(InvalidAnnouncement):
        Announcement.from_dict({key: plain[key] for key in plain if key != name})


@pytest.mark.parametrize("name", [item.name for item in fields(Announcement)])
def test_every_field_must_be_of_its_type(name: str) -> None:
    fine = {"moving_to": [None], "pinned": [True]}
    for wrong in (None, True, {"x": object()}, [None], -1, b"bytes", "\x1b[2J"):
        if wrong in fine.get(name, []):
            continue
        with pytest.raises(InvalidAnnouncement):
            Announcement.from_dict(record().to_dict() | {name: wrong})


def test_what_is_usual_is_not_on_the_wire() -> None:
    assert not set(OPTIONAL) & set(record().to_dict())
    unusual = {
        "adapters": ("a",),
        "rtts": {"bob": 0.1},
        "bandwidth": 1.0,
        "moving_to": (1, 2),
        "pinned": True,
    }
    assert set(OPTIONAL) == set(unusual)
    for name, value in unusual.items():
        a = record(**{name: value})
        assert name in a.to_dict()
        assert Announcement.from_dict(a.to_dict()) == a


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 1 << 20), (1, 2, 3), (1.0, 2), "ab"])
def test_a_move_that_cannot_be_is_refused(span: object) -> None:
    assert refused(moving_to=span) == "span"


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e13])
def test_a_bandwidth_that_cannot_be_is_refused(value: float) -> None:
    assert refused(bandwidth=value) == "bandwidth"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"decode_tps": 0.0}, "zero"),
        ({"forward_tps": math.nan}, "nan"),
        ({"decode_tps": -1.0}, "out-of-range"),
        ({"decode_tps": "fast"}, "malformed"),
        ({"rtts": {"bob": 0}}, "zero"),
        ({"rtts": {"bob": math.nan}}, "nan"),
        ({"rtts": {"bob": 61.0}}, "out-of-range"),
        ({"end": 1 << 20}, "out-of-range"),
        ({"seq": 0}, "zero"),
        ({"state": "asleep"}, "malformed"),
    ],
)
def test_refusals_say_what_was_tried(changes: dict[str, Any], kind: str) -> None:
    assert refusal(**changes).kind == kind


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("signature", "forged"),
        ("stale", "replayed"),
        ("expired", "replayed"),
        ("size", "oversize"),
        ("future", "far-future"),
        ("rpc", "malformed"),
    ],
)
def test_every_reason_is_of_a_kind(reason: str, kind: str) -> None:
    assert refusal_kind(reason) == kind


def test_round_trips_are_named_by_the_end_of_the_peer_id() -> None:
    assert rtt_key("12D3KooWExampleOfAPeerId") == "leOfAPeerId"[-10:]
    assert rtt_key("bob") == "bob"


@pytest.mark.parametrize("field", ["decode_tps", "forward_tps"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 10**400])
def test_throughput_that_cannot_be_is_refused(field: str, value: float) -> None:
    assert refused(**{field: value}) == "throughput"


@pytest.mark.parametrize(("start", "end"), [(3, 3), (4, 3), (-1, 2), (0, 1 << 20), (0.0, 2)])
def test_span_that_cannot_be_is_refused(start: int, end: int) -> None:
    assert refused(start=start, end=end) == "span"


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, 61.0])
def test_round_trip_that_cannot_be_is_refused(value: float) -> None:
    assert refused(rtts={"bob": value}) == "rtts"


def test_lists_are_bounded() -> None:
    addr = "/ip4/10.0.0.1/tcp/1/p2p/alice"
    assert refused(addrs=(addr,) * 9) == "addrs"
    assert refused(addrs=("/dns4/" + "x" * 200 + "/p2p/alice",)) == "addrs"
    assert refused(adapters=("a",) * 9) == "adapters"
    assert refused(rtts={f"p{i}": 0.1 for i in range(17)}) == "rtts"
    assert refused(name="ä" * 33) == "name"
    assert refused(ttl_s=86_401.0) == "ttl_s"


def test_addresses_belong_to_the_peer() -> None:
    assert refused(addrs=("/ip4/10.0.0.1/tcp/1/p2p/bob",)) == "addrs"
    assert refused(addrs=("/ip4/10.0.0.1/tcp/1",)) == "addrs"


@pytest.mark.parametrize("skew_s", [-30.0, 0.0, 30.0])
def test_clocks_thirty_seconds_apart_work(skew_s: float) -> None:
    check_clock(record(issued_at=WALL + skew_s), WALL)


def test_future_and_outlived_records_are_refused() -> None:
    with pytest.raises(InvalidAnnouncement) as caught:
        check_clock(record(issued_at=WALL + MAX_CLOCK_SKEW_S + 1), WALL)
    assert caught.value.reason == "future"
    with pytest.raises(InvalidAnnouncement) as caught:
        check_clock(record(issued_at=WALL - 30 - MAX_CLOCK_SKEW_S - 1, ttl_s=30.0), WALL)
    assert caught.value.reason == "expired"


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(InvalidAnnouncement):
        replace(record(), state="asleep")


words = st.text("a0/\x1bä", max_size=4)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(sorted(record().to_dict())), anything))
def test_only_one_error_for_any_garbage(changes: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidAnnouncement):
        a = Announcement.from_dict(record().to_dict() | changes)
        assert a.decode_tps > 0
        assert a.start < a.end
