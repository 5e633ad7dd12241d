"""The swarm simulator: small swarms, of which all is known."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from petalnode.routing.placement import best_window, choose_window
from petalnode.routing.rebalance import best_moves, plan_moves
from petalnode.simnet.__main__ import main
from petalnode.simnet.swarm.clock import Clock
from petalnode.simnet.swarm.measure import Meter, summarize
from petalnode.simnet.swarm.policies import POLICIES
from petalnode.simnet.swarm.scenario import Departure, Group, Scenario, Sessions, parse_scenario
from petalnode.simnet.swarm.simulation import Simulation

EIGHT = Group("eight", 8, (4, 4), (40.0, 40.0), joins_s=(0.0, 20.0))
CALM = Scenario("calm", 8, 200.0, 150.0, (EIGHT,), sessions=Sessions(5.0, 40.0))
# Enough for each block four times; then one half of the peers goes without a word.
LOSS = Scenario(
    "loss",
    9,
    250.0,
    200.0,
    (replace(EIGHT, count=16, memory_blocks=(3, 3)),),
    departures=(Departure(60.0, 0.5, crash_share=1.0),),
    sessions=Sessions(1.0, 60.0),
)


def run(scenario: Scenario, policy: str = "ours", seed: int = 1) -> Meter:
    return Simulation(scenario, policy, seed).run()


def test_things_happen_in_order_and_those_of_one_time_as_asked() -> None:
    clock, seen = Clock(), []

    def note(what: str) -> Callable[[], None]:
        return lambda: seen.append((clock.now, what))

    clock.after(2.0, note("c"))
    clock.after(1.0, note("a"))
    clock.after(1.0, note("b"))
    clock.after(9.0, note("too late"))
    clock.run(5.0)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    assert clock.now == 5.0


def test_a_calm_swarm_reaches_its_bound_without_moving() -> None:
    meter = run(CALM)
    last = meter.samples[-1]
    assert (last.online, last.tps, last.bound) == (8, 40.0, 40.0)
    assert meter.replicas == [4] * 8
    assert summarize(meter, 150.0).share == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_after_a_loss_ours_mends_what_the_join_rule_leaves(seed: int) -> None:
    shares = {
        policy: summarize(run(LOSS, policy, seed), 200.0).share for policy in ("none", "ours")
    }
    assert shares["ours"] >= 0.95 > shares["none"]


def test_moves_drop_no_session_where_the_papers_rule_does() -> None:
    ours, paper = ([run(LOSS, policy, seed) for seed in range(6)] for policy in ("ours", "paper"))
    assert sum(meter.moves for meter in ours) > 0
    assert sum(meter.traffic.migrated for meter in ours) > 0
    assert sum(meter.traffic.dropped_by_moves for meter in ours) == 0
    assert sum(meter.traffic.dropped_by_moves for meter in paper) > 0


def test_a_move_loads_only_what_it_lacks() -> None:
    meters = [run(LOSS, "ours", seed) for seed in range(2)]
    moves, loaded = (sum(getattr(m, what) for m in meters) for what in ("moves", "blocks_loaded"))
    assert 0 < loaded < 3 * moves


def test_views_choose_as_nodes_do_that_begin_with_all_records() -> None:
    simulation = Simulation(replace(LOSS, duration_s=90.0, steady_from_s=80.0), "ours", 1)
    simulation.run()
    for view in simulation.views:
        records = list(view.records.values())
        assert best_moves(view.seating) == plan_moves(records, 9)
        for size in (1, 3):
            assert best_window(view.seating, size) == choose_window(records, 9, size)


def test_days_come_and_go() -> None:
    day = replace(EIGHT, day_s=200.0, awake_share=0.5)
    online = [s.online for s in run(replace(CALM, nodes=(day,), duration_s=400.0)).samples]
    assert min(online[5:]) == 0
    assert max(online) == 8


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_gives_the_same_digest(policy: str) -> None:
    digests = [run(LOSS, policy, seed).digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


SMALL = """
title = "Small"
blocks = 8
duration_s = 200
steady_from_s = 100
[[nodes]]
name = "all"
count = 10
memory_blocks = [2, 4]
rate = [10, 90]
up_s = 60
down_s = 20
[sessions]
every_s = 2
"""


def test_the_same_digest_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    command = [sys.executable, "-m", "petalnode.simnet", str(path), "--seed", "7", "--json"]
    outs = [
        subprocess.run(
            command,
            env=os.environ | {"PYTHONHASHSEED": hashing},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hashing in ("1", "2")
    ]
    assert outs[0] == outs[1]
    report = json.loads(outs[0])
    assert report["summary"]["sessions"] > 20
    assert len(report["samples"]) == 21


def test_the_report_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    assert main([str(path), "--rule", "paper", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    for part in ("Small", "rule paper, seed 3", "█", "─", "of the bound in the mean", "Digest"):
        assert part in said


def test_a_bundled_scenario_is_found_by_name_and_a_bad_one_gets_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["no-such-scenario"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("The scenario 'no-such-scenario' cannot be read")


def test_a_swarm_that_cannot_hold_the_model_is_reported_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(SMALL.replace("count = 10", "count = 1"))
    assert main([str(path)]) == 0
    assert "0 sessions" in capsys.readouterr().out


def test_scenarios_of_tests_are_those_of_files() -> None:
    plain = {"title": "calm", "blocks": 8, "duration_s": 200, "steady_from_s": 150}
    nodes = {"name": "eight", "count": 8, "memory_blocks": 4, "rate": 40, "joins_s": [0, 20]}
    sessions = {"every_s": 5, "mean_s": 40}
    assert parse_scenario(plain | {"nodes": [nodes], "sessions": sessions}) == CALM
