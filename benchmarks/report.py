"""What a section found: tables, targets and whether they were reached, notes. Text is Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells are texts; the first column is aligned left, the others right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def lines(self) -> list[str]:
        """The table in Markdown, its columns aligned so that it reads well on a terminal too."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        text = [aligned(row, widths) for row in (self.head, rule, *self.rows)]
        return [f"**{self.title}**", "", *text] if self.title else text


@dataclass(frozen=True)
class Target:
    """A figure that a section must reach: ``value`` at most or at least ``limit``."""

    what: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        """``reached`` or by how much it was missed."""
        if self.reached:
            return "reached"
        by = abs(self.value - self.limit)
        share = f" ({by / self.limit:.0%})" if self.limit else ""
        return f"missed by {figure(by)}{self.unit}{share}"

    def line(self) -> str:
        sign = "≥" if self.at_least else "≤"
        measured = f"{figure(self.value)}{self.unit}"
        mark = "x" if self.reached else " "
        wanted = f"{sign} {figure(self.limit)}{self.unit}"
        return f"- [{mark}] {self.what}: {measured}, target {wanted}: **{self.verdict}**"


@dataclass
class Result:
    """One section's outcome. ``values`` are the bare numbers, for programs."""

    title: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0

    def markdown(self) -> str:
        """The section, heading included."""
        lines = [f"## {self.title}", ""]
        for table in self.tables:
            lines += [*table.lines(), ""]
        lines += [*(target.line() for target in self.targets), ""] if self.targets else []
        lines += [*self.notes, ""] if self.notes else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Numbers and verdicts, without the tables."""
        targets = [asdict(target) | {"verdict": target.verdict} for target in self.targets]
        return {"section": self.title, "values": self.values, "targets": targets} | {
            "notes": self.notes,
            "took_s": round(self.took_s, 1),
        }


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "| " + " | ".join([first, *rest]) + " |"


def figure(value: float) -> str:
    """Three significant digits, without exponents."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:,.{digits}f}"
    return text if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def middle(rounds: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Median and least over rounds of each round's own median."""
    medians = [statistics.median(samples) for samples in rounds]
    return statistics.median(medians), min(medians)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that ``share`` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
