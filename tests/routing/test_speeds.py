import math
import random

import numpy as np
import pytest

from petalnode.routing import speeds
from petalnode.routing.chain import Router
from petalnode.routing.costs import Columns, Knowledge
from petalnode.routing.speeds import (
    HEADSTART,
    MAX_RATIO,
    MEMORY_S,
    SpeedLedger,
    believed_block_s,
)

from .records import record


def test_speed_is_announced_for_the_whole_span() -> None:
    columns = Columns([record(start=2, end=6, decode_tps=10.0, forward_tps=100.0)])
    assert columns.decode_s.tolist() == [1 / 40]
    assert columns.forward_s.tolist() == [1 / 400]


def test_nobody_is_taken_for_much_faster_than_the_median_before_it_was_measured() -> None:
    said, load = np.array([2.0, 2.0, 2.0, 2.0, 1e-6]), np.ones(5)
    for measured, believed in ((0.0, 2.0 / HEADSTART), (0.01, 0.01), (18.0, 18.0)):
        column = np.array([0.0, 0.0, 0.0, 0.0, measured])
        assert believed_block_s(said, column, load).tolist() == [2.0, 2.0, 2.0, 2.0, believed]
    nothing = np.zeros(0)
    assert believed_block_s(nothing, nothing, nothing).shape == (0,)


def test_the_headstart_is_over_the_median() -> None:
    said = np.array([7.0, 9.0, 1.0, 8.0, 10.0])
    assert believed_block_s(said, np.zeros(5), np.ones(5))[2] == 8.0 / HEADSTART


def test_of_two_peers_the_faster_is_believed() -> None:
    said = np.array([1.0, 0.001])
    assert believed_block_s(said, np.zeros(2), np.ones(2)).tolist() == [1.0, 0.001]


def test_waiting_work_counts_and_is_not_undone_by_an_old_measurement() -> None:
    said, measured = np.array([1.0, 1.0]), np.array([0.5, 0.0])
    assert believed_block_s(said, measured, np.array([3.0, 1.0])).tolist() == [3.0, 1.0]


def test_measurements_are_smoothed() -> None:
    ledger = SpeedLedger()
    ledger.observe("a", 0.1, 0.0)
    assert ledger.block_s(0.0) == {"a": 0.1}
    ledger.observe("a", 0.2, 1.0)
    assert ledger.block_s(1.0) == {"a": pytest.approx(0.13)}
    ledger.observe("a", 1e9, 2.0)
    assert ledger.block_s(2.0)["a"] < 0.13 * MAX_RATIO
    ledger.forget("a")
    ledger.forget("a")
    assert ledger.block_s(2.0) == {}


def test_measurements_grow_old() -> None:
    ledger = SpeedLedger()
    ledger.observe("a", 0.1, 0.0)
    assert ledger.block_s(MEMORY_S - 1) == {"a": 0.1}
    assert ledger.block_s(MEMORY_S) == {}
    ledger.observe("a", 0.5, MEMORY_S)
    assert ledger.block_s(MEMORY_S) == {"a": 0.5}


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_ignored(bad: float) -> None:
    ledger = SpeedLedger()
    ledger.observe("a", bad, 0.0)
    assert not ledger.block_s(0.0)


def test_the_ledger_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "MAX_PEERS", 2)
    ledger = SpeedLedger()
    for peer in ("a", "b", "a", "c"):
        ledger.observe(peer, 0.1, 0.0)
    assert set(ledger.block_s(0.0)) == {"a", "c"}


def test_a_peer_that_boasts_is_found_out_by_its_speed() -> None:
    """It advertises a million tokens/s and is ten times slower than the others."""
    half = 4
    swarm = [
        record(f"{side}{i}", start, start + half, decode_tps=100.0)
        for side, start in (("a", 0), ("b", half))
        for i in range(4)
    ]
    swarm.append(record("boaster", 0, half, decode_tps=1e6))
    true_s = {a.peer_id: 1 / (100.0 * half) for a in swarm} | {"boaster": 1 / (10.0 * half)}
    known_rtts = {a.peer_id: 0.01 for a in swarm}
    router, ledger, rng = Router(2 * half), SpeedLedger(), random.Random(1)
    chosen = []
    for now in range(60):
        known = Knowledge(rtts=known_rtts, decode_s=ledger.block_s(now))
        names = [hop.peer_id for hop in router.find(swarm, known, rng=rng).hops]
        chosen.append("boaster" in names)
        for name in names:
            ledger.observe(name, true_s[name], now)
    assert chosen[0]
    assert sum(chosen) <= 3
    assert not any(chosen[10:])
