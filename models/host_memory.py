"""How much memory this machine still gives to a process, as the kernel counts it. No torch.

On Linux the page cache counts as free, and the limits of control groups (containers) as limits.
Sources: proc(5), `MemAvailable`; the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

Read = Callable[[str], str | None]
"""Returns the text of a small file, or None where there is none."""

CGROUPS = "/sys/fs/cgroup"
NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""


def read_text(path: str) -> str | None:
    """Return the text of a file, or None where it cannot be read."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def available_bytes(read: Read = read_text) -> int:
    """Return what can be allocated without swapping, at least 0.

    Where the system does not say, half of the memory that it has.
    """
    available = _field(read("/proc/meminfo"), "MemAvailable:")
    if available is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, min([available * 1024, *_cgroup_rooms(read)]))


def _cgroup_rooms(read: Read) -> Iterator[int]:
    """Yield the bytes left in each control group that this process is in, and in those around."""
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            files = (CGROUPS, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            usage = "memory.usage_in_bytes"
            limit = "memory.limit_in_bytes"
            files = (f"{CGROUPS}/memory", limit, usage, "total_inactive_file")
        else:
            continue
        # A container may see its group named as on the host: folders that are not there count not.
        path = PurePosixPath("/" + group.lstrip("/"))
        for one in (path, *path.parents):
            room = _room(read, files[0] + str(one).rstrip("/"), *files[1:])
            if room is not None:
                yield room


def _room(read: Read, folder: str, limit: str, usage: str, inactive: str) -> int | None:
    """Return limit - usage of one group; file pages that the kernel would drop count as free."""
    most, used = _number(read(f"{folder}/{limit}")), _number(read(f"{folder}/{usage}"))
    if most is None or used is None or most >= NO_LIMIT:
        return None
    return most - used + (_field(read(f"{folder}/memory.stat"), inactive) or 0)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


def _field(text: str | None, name: str) -> int | None:
    """Return the number after `name` at the beginning of a line."""
    for line in (text or "").splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return _number(words[1])
    return None
