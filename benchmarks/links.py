"""Bytes that processes of this machine sent each other over TCP, as the kernel counts them.

``ss`` of iproute2 shows for every socket its owner and how much it has sent. A connection to a
process that is gone is no longer counted.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

SOCKET = re.compile(
    r"^ESTAB\s+\d+\s+\d+\s+\S*?:(?P<ours>\d+)\s+\S*?:(?P<theirs>\d+)\s+"
    r"users:\(\(.*?pid=(?P<pid>\d+),.*\)\)"
)
SENT = re.compile(r"\bbytes_sent:(\d+)")

Sent = dict[tuple[int, int, int, int], int]
"""Bytes by sender's and receiver's process, sender's and receiver's port."""


def sent_bytes() -> Sent:
    """What each end of every connection between processes of ours has sent until now."""
    ask = ["ss", "--tcp", "--info", "--numeric", "--processes", "--no-header", "--oneline"]
    shown = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for line in shown.splitlines():
        socket, sent = SOCKET.search(line), SENT.search(line)
        if socket:
            ports = int(socket["ours"]), int(socket["theirs"])
            ends[ports] = int(socket["pid"]), int(sent[1]) if sent else 0
    return {
        (pid, ends[theirs, ours][0], ours, theirs): sent
        for (ours, theirs), (pid, sent) in ends.items()
        if (theirs, ours) in ends
    }


def sent_between(before: Sent, after: Sent) -> Mapping[tuple[int, int], int]:
    """Bytes by sending and receiving process that were sent between two looks."""
    links: dict[tuple[int, int], int] = {}
    for key, sent in after.items():
        link = key[:2]
        links[link] = links.get(link, 0) + sent - before.get(key, 0)
    return links
