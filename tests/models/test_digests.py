"""What is remembered of files: a bounded number of digests, by whoever asks at the same time."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from petalnode.models import digests
from petalnode.models.digests import remembered

LIMIT, KEPT = 6, 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are; each file is younger than those before it, as its number says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(digests, "MAX_REMEMBERED", LIMIT)
    monkeypatch.setattr(digests, "KEPT_WHEN_FULL", KEPT)
    return tmp_path / "petalnode" / "digests"


def computed(key: str) -> Callable[[], str]:
    return lambda: hashlib.sha256(key.encode()).hexdigest()


def never() -> str:
    raise AssertionError("computed again")


def put(folder: Path, key: str, age_s: float) -> Path:
    """Remember a key, and make its file as old as that."""
    before = set(folder.glob("*"))
    remembered(key, computed(key))
    (path,) = set(folder.glob("*")) - before
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))
    return path


def test_the_oldest_make_room(folder: Path) -> None:
    paths = [put(folder, str(number), 1000.0 - number) for number in range(LIMIT)]
    assert len(list(folder.iterdir())) == LIMIT
    remembered("0", never)  # used again: now it is the youngest
    remembered("new", computed("new"))
    assert [number for number, path in enumerate(paths) if path.exists()] == [0, 4, 5]
    assert len(list(folder.iterdir())) == KEPT
    assert remembered("new", never) == computed("new")()
    assert remembered("0", never) == computed("0")()
    assert remembered("1", computed("1")) == computed("1")()


def test_another_process_forgets_at_the_same_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [put(folder, str(number), 1000.0 - number) for number in range(LIMIT)]
    unlink, stat = Path.unlink, Path.stat

    def look(path: Path, **options: bool) -> os.stat_result:
        if path == paths[0]:
            unlink(path)
        return stat(path, **options)

    def forget(path: Path, missing_ok: bool = False) -> None:
        unlink(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", look)
        patch.setattr(Path, "unlink", forget)
        remembered("new", computed("new"))
    assert [number for number, path in enumerate(paths) if path.exists()] == [3, 4, 5]
    assert remembered("new", never) == computed("new")()


def test_what_cannot_be_touched_is_remembered_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    remembered("a", computed("a"))
    monkeypatch.setattr(os, "utime", refuse)
    assert remembered("a", never) == computed("a")()
