"""The signals that ask a verb to end, as its loop takes them."""

from __future__ import annotations

import signal


def asking_to_end() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGINT where it is not ignored: a shell starts its background jobs so, and their
    Ctrl-C is not meant for us."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGINT, signal.SIGTERM)


def kill_from_now_on() -> None:
    """The next one ends the process at once, whatever it waits for."""
    for one in asking_to_end():
        signal.signal(one, signal.SIG_DFL)
