"""docs/adding-a-model.md and docs/models.md name only what exists, and all families."""

import re
from pathlib import Path

import pytest

from petalnode.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
ADDING, MODELS = ROOT / "docs/adding-a-model.md", ROOT / "docs/models.md"
EXAMPLE = ROOT / "models/families/bloom.py"
SOURCES = "\n".join(path.read_text() for path in sorted((ROOT / "models").rglob("*.py")))
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.S)


def words_in_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text()))


@pytest.mark.parametrize("document", [ADDING, MODELS], ids=["adding", "models"])
def test_paths_exist(document: Path) -> None:
    named = [word for word in words_in_code(document) if re.fullmatch(r"[\w.-]+/[\w./-]*", word)]
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
    for link in re.findall(r"\]\(([\w.-]+)\)", document.read_text()):
        assert (document.parent / link).exists()


def test_code_shown_is_the_code() -> None:
    blocks = [text for language, text in FENCE.findall(ADDING.read_text()) if language == "python"]
    assert len(blocks) > 3
    assert [text for text in blocks if text not in EXAMPLE.read_text()] == []


def test_names_shown_exist() -> None:
    """Words like `Parts.linear` or `common_fields` are defined or passed somewhere in models/."""
    shown = [word for word in words_in_code(ADDING) if re.fullmatch(r"[A-Za-z_]+(\.\w+)?\.?", word)]
    known = set(re.findall(r"\w+", SOURCES))
    parts = {part for word in shown for part in word.rstrip(".").split(".")}
    assert len(parts) > 20
    assert parts - known - {"json"} == set()


def test_every_family_has_its_row() -> None:
    """In the table of families, and in the one that a command writes."""
    families, parity = MODELS.read_text().split("## Parity")
    _, *rows = [line.split("|")[1] for line in families.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(FAMILIES)
    measured = {line.split("|")[1].strip() for line in parity.splitlines() if line.startswith("|")}
    assert measured >= set(FAMILIES), "run python -m benchmarks parity"
