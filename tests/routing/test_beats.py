import random

import pytest

from petalnode.routing.announcement import MAX_TTL_S, Announcement, rtt_key
from petalnode.routing.beats import (
    ANNOUNCED_RTTS,
    BEAT_S,
    CENSUS,
    JITTER,
    MISSED_BEATS,
    SMALL_SWARM,
    STEADY_RTT,
    Census,
    beat_interval,
    interesting_peers,
    next_beat,
    record_ttl,
    rtts_to_announce,
)

from .records import record

LARGEST = 10_000


def test_a_small_swarm_beats_fast() -> None:
    assert {beat_interval(size) for size in range(1, SMALL_SWARM + 1)} == {BEAT_S}


def test_messages_a_second_stay_flat_however_large_the_swarm() -> None:
    rates = [size / beat_interval(size) for size in range(1, LARGEST)]
    assert max(rates) <= SMALL_SWARM / BEAT_S
    assert all(rate < 0.85 for rate in rates[300:])


@pytest.mark.parametrize("size", [1, 16, 17, 1000, LARGEST, 10**6])
def test_a_record_outlives_three_beats_and_can_be_announced(size: int) -> None:
    rng = random.Random(1)
    waits = [next_beat(size, rng) for _ in range(100)]
    assert max(waits) <= beat_interval(size) * (1 + JITTER)
    assert max(waits) - min(waits) > beat_interval(size) * JITTER
    assert record_ttl(size) >= MISSED_BEATS * max(waits)
    assert record_ttl(size) <= MAX_TTL_S
    record(ttl_s=record_ttl(size))


def crowd() -> list[Announcement]:
    return [
        *(record(f"before{i}", 0, 4) for i in range(9)),
        *(record(f"after{i}", 8, 12) for i in range(9)),
        *(record(f"beside{i}", 4, 8) for i in range(9)),
        record("left", 0, 4, state="offline"),
    ]


def test_the_nearest_at_both_ends_of_the_span_are_of_interest_and_some_others() -> None:
    own = record("own", 4, 8)
    rtts = {"before3": 0.01, "before5": 0.02, "before7": 0.5, "after2": 0.03, "beside1": 0.001}
    chosen = interesting_peers(own, [own, *crowd()], rtts, random.Random(1))
    assert len(chosen) == len(set(chosen)) == ANNOUNCED_RTTS
    assert {"before3", "before5", "after2"} <= set(chosen)
    assert chosen[:2] == ["before3", "before5"]
    assert chosen[2] == "after2"
    assert chosen[3].startswith("after")
    assert not {"own", "left"} & set(chosen)
    seen = {
        name
        for seed in range(50)
        for name in interesting_peers(own, crowd(), rtts, random.Random(seed))
    }
    assert len(seen) == 27


def test_of_few_peers_all_are_of_interest() -> None:
    own = record("own", 0, 4)
    assert interesting_peers(own, [own, record("a")], {}, random.Random(1)) == ["a"]
    assert interesting_peers(own, [own], {}, random.Random(1)) == []


def test_announced_round_trips_change_only_when_they_do() -> None:
    long = "12D3KooWSomePeerIdThatIsLong"
    measured = {"a": 0.1, "b": 0.1, long: 0.0123456789, "zero": 0.0, "tiny": 1e-9}
    steady, moved = 0.1 / (1 + STEADY_RTT / 2), 0.1 / (1 + 2 * STEADY_RTT)
    got = rtts_to_announce(
        measured, ["a", "b", long, "zero", "tiny", "unmeasured"], {"a": steady, "b": moved}
    )
    assert got == {"a": steady, "b": 0.1, rtt_key(long): 0.012346, "tiny": 1e-6}
    record(rtts=got)


def test_peers_that_do_not_exist_hardly_stretch_the_beats() -> None:
    census = Census()
    assert census.size(1000) == 1000  # nobody was tried yet
    for _ in range(CENSUS):
        census.note(True)
    assert census.size(1000) == 1000
    for _ in range(2 * CENSUS):
        census.note(False)
    assert census.size(16_384) == round(16_384 / (1 + CENSUS))
    assert beat_interval(census.size(16_384)) < 200.0
    assert census.size(0) == census.size(1) == 1


def test_half_of_a_swarm_unreachable_costs_half_the_interval() -> None:
    census = Census()
    for number in range(CENSUS):
        census.note(number % 2 == 0)
    assert 490 < census.size(1000) < 510
