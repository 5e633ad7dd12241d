"""sha256 of large files, computed once and remembered under $XDG_CACHE_HOME/petalnode/digests.

Remembering is best effort: a cache that cannot be written costs time, never correctness. The key
names everything that the digest depends on, so an entry never goes stale; what was not asked for
longest makes room for others. Several processes may write and forget at once.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

MAX_REMEMBERED = 4096
"""Digests that are kept; a model has one a shard, an adapter two."""
KEPT_WHEN_FULL = 3072
"""How many are left when there were more: the next ones find room without a search."""

_SHA256 = re.compile("[0-9a-f]{64}")


def remembered(key: str, compute: Callable[[], str]) -> str:
    """Return the sha256 (64 hex digits) stored for `key`, or compute and store it."""
    path = _cache_dir() / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        stored = path.read_text(encoding="ascii")
        if _SHA256.fullmatch(stored):
            with contextlib.suppress(OSError):
                os.utime(path)  # it is still in use
            return stored
    digest = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(digest)
        os.replace(file.name, path)
        _forget_oldest(path.parent)
    return digest


def _forget_oldest(folder: Path) -> None:
    names = os.listdir(folder)
    if len(names) <= MAX_REMEMBERED:
        return
    ages = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another process forgot it
            ages.append(((folder / name).stat().st_mtime_ns, name))
    for _, name in sorted(ages)[: max(len(ages) - KEPT_WHEN_FULL, 0)]:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes; a file is hashed once per path, size and change."""
    path = path.resolve()
    stat = path.stat()

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(f"file {path} {stat.st_size} {stat.st_mtime_ns}", compute)


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "petalnode" / "digests"
