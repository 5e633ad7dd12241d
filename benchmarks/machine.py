"""Where and on what a benchmark ran: the head of its report."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("petalnode", "torch", "transformers", "libp2p", "trio")


def describe() -> list[str]:
    """Date, processor, memory, versions, commit, load: one line each."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [
        f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"Machine: {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} "
        f"{platform.release()}",
        f"Versions: Python {platform.python_version()}, {versions}",
        f"Commit: {commit()}",
        f"Load before: {os.getloadavg()[0]:.2f}",
    ]


def processor() -> str:
    """Name, and for those that hypervisors leave nameless family and model."""
    facts = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    family, model, mhz = (facts.get(key) for key in ("cpu family", "model", "cpu MHz"))
    return f"{name} (family {family} model {model}, {mhz} MHz)" if family else name


def commit() -> str:
    """The commit of the checkout, marked where files differ from it."""
    show = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return show.stdout.strip() or "unknown"
