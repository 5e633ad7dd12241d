"""The ``petalnode`` command in a world where only announced addresses can be reached.

A node behind the benchmark's relay also tells its loopback address, which would win the race.
"""

from __future__ import annotations

import sys


def use_announced_only() -> None:
    """Let the first address of a peer, which is the announced one, have all the time it needs."""
    from petalnode.p2p import host

    host.STAGGER_S = 60.0


if __name__ == "__main__":
    from petalnode.cli.main import main

    use_announced_only()
    sys.exit(main())
