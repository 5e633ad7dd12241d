"""``petalnode status``: ask a contact who serves which blocks, measure how far they are."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import trio

from petalnode.cli.output import note, reporter
from petalnode.cli.swarm_table import swarm_lines
from petalnode.errors import PeerUnreachable, UsageError
from petalnode.events import Event, Report, Swarm
from petalnode.joining import parse_joins
from petalnode.models.checkpoint import open_checkpoint
from petalnode.p2p.invite import Invite

WATCH_INTERVAL_S = 2.0
HOME, END_LINE, END_SCREEN, CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"
"""What every terminal understands (ECMA-48)."""


def main(arguments: Namespace) -> int:
    """Once, or again and again with ``--watch``, until interrupted."""
    if not arguments.join:
        raise UsageError(
            "There is no swarm to ask: no --join was given.",
            "Pass the invite that `petalnode run` prints.",
        )
    joins = parse_joins(arguments.join)
    fingerprint = None
    if arguments.model is not None:
        checkpoint = open_checkpoint(
            arguments.model, revision=arguments.revision, cache_dir=arguments.cache_dir
        )
        fingerprint = checkpoint.fingerprint
    show = watch if arguments.watch else once
    trio.run(show, joins, fingerprint, report_for(arguments))
    return 0


def report_for(arguments: Namespace) -> Report:
    """A line of JSON, or text; a terminal that watches is drawn over."""
    if arguments.watch and not arguments.json and sys.stdout.isatty():
        return Screen(partial(print, end="", flush=True), shutil.get_terminal_size)
    return reporter(arguments.json)


async def once(joins: list[Invite | str], fingerprint: str | None, report: Report) -> None:
    """Report the swarm as the first contact that answers sees it."""
    from petalnode.survey import open_survey

    async with open_survey(joins, fingerprint) as survey:
        report(await survey.look())


async def watch(joins: list[Invite | str], fingerprint: str | None, report: Report) -> None:
    """The same again and again. Once it was found, a swarm out of reach is waited for."""
    from petalnode.survey import open_survey

    async with open_survey(joins, fingerprint) as survey:
        report(await survey.look())
        while True:
            await trio.sleep(WATCH_INTERVAL_S)
            try:
                report(await survey.look())
            except PeerUnreachable as error:
                note(f"{error.cause} Asking again every {WATCH_INTERVAL_S:.0f} s.")


class Screen:
    """A ``Report`` that draws each swarm over the last one, as much as fits the terminal."""

    def __init__(self, write: Callable[[str], object], size: Callable[[], tuple[int, int]]) -> None:
        self._write = write
        self._size = size
        self._write(CLEAR)

    def __call__(self, event: Event) -> None:
        assert isinstance(event, Swarm)
        columns, rows = self._size()
        lines = swarm_lines(event)
        if len(lines) > rows - 1:
            lines = [*lines[: rows - 2], f"… {len(lines) - rows + 2} more lines"]
        text = "".join(f"{line[:columns]}{END_LINE}\n" for line in lines)
        self._write(f"{HOME}{text}{END_SCREEN}")
