"""Documentation strings of this Python's standard library as JSON lines, to tune a model on.

    python -m benchmarks.docstrings TRAIN.jsonl EVAL.jsonl

Each string is one ``{"text": …}``. Files go whole to one side: those that the bundled model was not
trained on (8 of 256 name hashes) are for evaluation.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
LEAST, MOST = 60, 1200
"""Characters: shorter strings say little, longer ones are cut at an empty line or dropped."""
HELD_OUT = 8
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def strings(root: Path, held_out: bool) -> Iterator[str]:
    """The strings of one side's files, each once, in the order of the files' names."""
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.intersection(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        if (hashlib.sha256(name.encode()).digest()[0] < HELD_OUT) != held_out:
            continue
        for text in documented(path.read_text(encoding="utf-8", errors="ignore")):
            if text not in seen:
                seen.add(text)
                yield text


def documented(source: str) -> Iterator[str]:
    """The documentation strings of a module that are neither short nor long."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node, clean=False) if isinstance(node, DOCUMENTED) else None
        if text is None:
            continue
        text = inspect.cleandoc(text)
        if len(text) > MOST:
            text = text[: max(0, text.rfind("\n\n", 0, MOST))]
        if len(text) >= LEAST:
            yield text


def write(path: Path, held_out: bool) -> int:
    """Write one side; how many strings it has."""
    texts = list(strings(Path(sysconfig.get_path("stdlib")), held_out))
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return len(texts)


def main() -> None:
    """Write both sides and say how large they are."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.docstrings TRAIN.jsonl EVAL.jsonl")
    for path, held_out in zip(map(Path, sys.argv[1:]), (False, True), strict=True):
        print(f"{path}: {write(path, held_out)} documentation strings")


if __name__ == "__main__":
    main()
