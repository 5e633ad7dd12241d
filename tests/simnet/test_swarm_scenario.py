"""Scenario files: what they say, and a sentence for each thing that is wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from petalnode.simnet.swarm.scenario import (
    SCENARIOS,
    Group,
    ScenarioError,
    parse_scenario,
    read_scenario,
)

GOOD = """
title = "Two kinds"
blocks = 8
duration_s = 100
steady_from_s = 50

[[nodes]]
name = "small"
count = 3
memory_blocks = [2, 4, 6]
rate = [10, 20.5]

[[nodes]]
name = "large"
count = 1
memory_blocks = 8
rate = 100

[[departures]]
at_s = 60
share = 0.5
group = "small"
"""


def test_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    scenario = read_scenario(path)
    assert (scenario.title, scenario.blocks, scenario.steady_from_s) == ("Two kinds", 8, 50.0)
    assert scenario.nodes == (
        Group("small", 3, (2, 4, 6), (10.0, 20.5)),
        Group("large", 1, (8, 8), (100.0, 100.0)),
    )
    assert scenario.departures[0].group == "small"
    assert scenario.news.death_s == (4.0, 12.0)


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_bundled_ones_are_good(path: Path) -> None:
    assert read_scenario(path).title


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks": 0}, "blocks in the top level is not a whole number in 1..1024."),
        ({"blocks": True}, "blocks in the top level is not a whole number"),
        ({"title": 3}, "title in the top level is not text."),
        ({"duration_s": -1}, "duration_s in the top level is not a number of at least 0."),
        ({"duration_s": float("nan")}, "duration_s in the top level is not a number"),
        ({"duration_s": 0}, "duration_s in the top level is 0, and must be more."),
        ({"steady_from_s": 100}, "steady_from_s is not before the end of duration_s."),
        ({"speed": 1}, "the top level has no key 'speed'; it has title, blocks"),
        ({"nodes": []}, "The scenario has no nodes."),
        ({"nodes": {}}, "nodes is not a list of tables."),
        ({"nodes": [3]}, "nodes is not a table."),
        ({"news": []}, "news is not a table."),
        ({"news": {"spread_s": [3, 1]}}, "spread_s in news has a low that is above its high."),
        ({"news": {"spread_s": [1, 2, 3]}}, "spread_s in news is not one number, and not low"),
        ({"news": {"regions": 1}}, "regions in news is not true or false."),
        ({"departures": [{"at_s": 1}]}, "departures lacks the key 'share'."),
        ({"departures": [{"at_s": 1, "share": 2}]}, "share in departures is 2, which is no share"),
        (
            {"departures": [{"at_s": 1, "share": 1, "group": "x"}]},
            "departures name the group 'x', which is none.",
        ),
    ],
)
def test_a_sentence_for_each_fault(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(tomllib.loads(GOOD) | change)
    assert caught.value.cause.startswith(sentence)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("count", 30_000, "count in nodes is not a whole number in 1..20000."),
        ("memory_blocks", [4], "memory_blocks in nodes is not one number, low and high"),
        ("memory_blocks", [4, 2], "memory_blocks in nodes has a low that is above its high."),
        ("memory_blocks", 0.5, "memory_blocks in nodes is not a whole number"),
        ("rate", 0, "rate in nodes is 0, and must be more."),
        ("rate", "fast", "rate in nodes is not a number of at least 0."),
        ("name", "large", "Two groups of nodes have the same name."),
    ],
)
def test_a_sentence_for_each_fault_of_a_group(key: str, value: object, sentence: str) -> None:
    plain = tomllib.loads(GOOD)
    plain["nodes"][0][key] = value
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(plain)
    assert caught.value.cause.startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"\xff\xfe", "cannot be read: it is not text."),
        (b"blocks = = 3", "bad.toml is not TOML: "),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScenarioError) as caught:
        read_scenario(path)
    assert sentence in caught.value.cause
