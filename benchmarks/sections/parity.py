"""Every family against transformers: logits, greedy tokens, bfloat16. No timings.

The checks and the tiny random checkpoints are those of ``tests/models``. A whole run writes its
table into ``docs/models.md``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging as their_logging

from benchmarks.machine import ROOT
from benchmarks.report import Result, Table, Target
from tests.checkpoints import make_tiny
from tests.models import parity
from tests.models.reference import load_reference
from tests.models.shapes import SHAPES

DOCUMENT = ROOT / "docs/models.md"
BEGIN, END = "<!-- made by python -m benchmarks parity -->", "<!-- end of what it made -->"
BFLOAT16_RATIO = 1.25
HEAD = (
    *("model_type", "shapes", "largest logit difference", "greedy tokens equal"),
    *("bfloat16 error, ours", "transformers", "largest ratio"),
)


@dataclass
class Shape:
    """What one tiny checkpoint showed. The last two are errors of logits in bfloat16."""

    difference: float
    tokens: int
    tokens_equal: int
    ours: float
    theirs: float


def run(quick: bool) -> Result:
    """Compare; a quick run takes one shape of each family and writes nothing."""
    torch.set_num_threads(1)
    their_logging.disable_progress_bar()
    their_logging.set_verbosity(logging.ERROR)
    found = {
        family: [measured(family, shape) for shape in list(shapes)[: 1 if quick else None]]
        for family, shapes in SHAPES.items()
    }
    everything = [shape for shapes in found.values() for shape in shapes]
    result = Result(
        "Parity: every family against transformers",
        tables=[Table(HEAD, [row(family, shapes) for family, shapes in found.items()])],
        targets=targets(everything),
        notes=[f"On a CPU: torch {version('torch')}, transformers {version('transformers')}."],
        values={family: [vars(shape) for shape in shapes] for family, shapes in found.items()},
    )
    if not quick:
        write(DOCUMENT, result)
    return result


def measured(family: str, shape: str) -> Shape:
    """Compare one tiny checkpoint."""
    with tempfile.TemporaryDirectory(prefix="petalnode-parity-") as directory:
        path = make_tiny(Path(directory) / "model", family=family, **SHAPES[family][shape])
        exact = load_reference(path)
        ours, theirs = parity.greedy_tokens(path, exact)
        error, their_error = parity.half_error(path, exact, load_reference(path, "bfloat16"))
        return Shape(
            max(check(path, exact) for check in parity.LOGIT_CHECKS),
            len(theirs),
            sum(a == b for a, b in zip(ours, theirs, strict=True)),
            error,
            their_error,
        )


def row(family: str, shapes: Sequence[Shape]) -> list[str]:
    """The worst of a family's shapes."""
    equal, tokens = sum(one.tokens_equal for one in shapes), sum(one.tokens for one in shapes)
    return [
        family,
        str(len(shapes)),
        f"{max(one.difference for one in shapes):.1e}",
        f"{equal} / {tokens}",
        f"{max(one.ours for one in shapes):.1%}",
        f"{max(one.theirs for one in shapes):.1%}",
        f"{max(one.ours / one.theirs for one in shapes):.2f}",
    ]


def targets(shapes: Sequence[Shape]) -> list[Target]:
    """What issue and tests ask for."""
    different = sum(one.tokens - one.tokens_equal for one in shapes)
    worst = max(one.difference for one in shapes)
    ratio = max(one.ours / one.theirs for one in shapes)
    return [
        Target("largest logit difference in float32", worst / 1e-6, parity.TOLERANCE / 1e-6, "e-6"),
        Target("greedy tokens that differ", different, 0.0),
        Target("bfloat16 error, ours / transformers", ratio, BFLOAT16_RATIO),
    ]


def write(document: Path, result: Result) -> None:
    """Replace what an earlier run put between the marks."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{document} lost the marks of its table"
    lines = [line for table in result.tables for line in table.lines()]
    lines += ["", *(target.line() for target in result.targets), "", *result.notes]
    document.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))
