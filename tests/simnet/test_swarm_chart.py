from petalnode.simnet.swarm.chart import columns_chart, sparkline, squeeze


def test_a_sparkline_shows_proportions_and_everything_above_zero() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0.001, 100]) == "▁█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([2, 2], top=4) == "▄▄"
    assert sparkline([]) == ""


def test_long_series_are_squeezed_to_means() -> None:
    assert squeeze([1, 3, 5, 7], 2) == [2, 6]
    assert squeeze([1, 2], 64) == [1, 2]
    assert len(squeeze(list(range(100)), 64)) == 64
    assert squeeze([], 5) == []


def test_columns_and_the_line_above_them() -> None:
    rows = columns_chart([0, 2, 4], [4, 4, 4], height=4)
    assert [row.split("│")[1] for row in rows] == ["──█", "  █", " ██", " ██"]
    assert rows[0].split("│")[0].strip() == "4"


def test_nothing_at_all_is_drawn_as_nothing() -> None:
    assert [row.split("│")[1] for row in columns_chart([0, 0], [0, 0], height=2)] == ["  ", "──"]
