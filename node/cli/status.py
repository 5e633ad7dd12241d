"""``petalnode status``: ask a contact who serves which blocks, measure how far they are."""

from __future__ import annotations

from argparse import Namespace

import trio

from petalnode.cli.output import reporter
from petalnode.errors import UsageError
from petalnode.joining import parse_joins
from petalnode.models.checkpoint import open_checkpoint
from petalnode.p2p.invite import Invite

WATCH_INTERVAL_S = 3.0


def main(arguments: Namespace) -> int:
    """Once, or again and again with ``--watch``."""
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
    trio.run(show, joins, fingerprint, arguments)
    return 0


async def show(joins: list[Invite | str], fingerprint: str | None, arguments: Namespace) -> None:
    """Report the swarm as the first contact that answers sees it."""
    from petalnode.survey import survey_swarm

    report = reporter(arguments.json)
    while True:
        report(await survey_swarm(joins, fingerprint))
        if not arguments.watch:
            return
        await trio.sleep(WATCH_INTERVAL_S)
