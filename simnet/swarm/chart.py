"""Charts in plain text: bars of Unicode blocks."""

from collections.abc import Sequence
from itertools import pairwise

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 64
HEIGHT = 8


def sparkline(values: Sequence[float], top: float = 0.0, width: int = WIDTH) -> str:
    """One line of bars; ``top`` is a full bar, by default the largest value."""
    columns = squeeze(values, width)
    top = top or max(columns, default=0.0)
    return "".join(BARS[_eighths(value, top, 1)] for value in columns)


def columns_chart(
    values: Sequence[float],
    line: Sequence[float],
    height: int = HEIGHT,
    width: int = WIDTH,
) -> list[str]:
    """``values`` as columns, and ``line``, which is never below them, as a line above them."""
    bars, marks = squeeze(values, width), squeeze(line, width)
    top = max([*bars, *marks], default=0.0) or 1.0
    rows = []
    for row in range(height - 1, -1, -1):
        cells = ""
        for value, mark in zip(bars, marks, strict=True):
            filled = min(max(_eighths(value, top, height) - 8 * row, 0), 8)
            at = min(int(mark / top * height), height - 1)
            cells += "─" if at == row and filled < 8 else BARS[filled]
        scale = (
            f"{top * (row + 1) / height:8.0f} " if row in (height - 1, height // 2 - 1) else " " * 9
        )
        rows.append(f"{scale}│{cells}")
    return rows


def squeeze(values: Sequence[float], width: int) -> list[float]:
    """At most ``width`` means of as many stretches."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else [0]
    return [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]


def _eighths(value: float, top: float, height: int) -> int:
    """How many eighths of a row a bar of ``value`` fills; anything above 0 is seen."""
    if value <= 0 or top <= 0:
        return 0
    return max(1, round(min(value / top, 1.0) * 8 * height))
