"""``petalnode run``: serve until interrupted; the first interrupt drains, the second stops."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import trio

from petalnode.cli.output import end_progress, reporter
from petalnode.cli.signals import asking_to_end, kill_from_now_on
from petalnode.events import Refused, Report, Stopped
from petalnode.joining import parse_joins
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.options import NodeOptions

REFUSALS_EVERY_S = 60.0
"""How often at most it is told what gossip was refused."""


def main(arguments: Namespace) -> int:
    """Check what can be checked before anything listens, then serve."""
    parse_joins(arguments.join)
    checkpoint = open_checkpoint(
        arguments.model, revision=arguments.revision, cache_dir=arguments.cache_dir
    )
    _ = checkpoint.fingerprint  # large files take a while: here an interrupt ends it
    if arguments.adapter:
        from petalnode.serving.adapters import check_here

        check_here(arguments.adapter, checkpoint.config)
    try:
        trio.run(serve, checkpoint, arguments, reporter(arguments.json))
    finally:
        end_progress()
    return 0


async def serve(checkpoint: Checkpoint, arguments: Namespace, report: Report) -> None:
    """One node, until told to stop."""
    from petalnode.node import open_node

    options = node_options(arguments)
    drained = False
    with trio.open_signal_receiver(*asking_to_end()) as signals:
        async with trio.open_nursery() as nursery:
            serving, drain = trio.Event(), trio.Event()
            nursery.start_soon(watch_signals, signals, serving, drain, nursery.cancel_scope)
            async with open_node(checkpoint, options, report) as node:
                serving.set()
                nursery.start_soon(tell_refusals, node.swarm.gossip.refused, report)
                await drain.wait()
                await node.drain()
                drained = True
            nursery.cancel_scope.cancel()
    report(Stopped())
    if not drained:
        raise KeyboardInterrupt


def node_options(arguments: Namespace) -> NodeOptions:
    """How to take part, by the flags. Raises ``UsageError``."""
    return NodeOptions(
        join=tuple(arguments.join),
        blocks=arguments.blocks,
        num_blocks=arguments.num_blocks,
        device=arguments.device,
        dtype=arguments.dtype,
        quant=arguments.quant,
        kv_tokens=arguments.kv_tokens,
        replay_log_tokens=arguments.replay_log_tokens,
        host=arguments.host,
        port=arguments.port,
        announce=tuple(arguments.announce),
        adapters=tuple(arguments.adapter),
        cache_dir=Path(arguments.cache_dir) if arguments.cache_dir else None,
        name=arguments.name,
        identity=Path(arguments.identity) if arguments.identity else None,
    )


async def tell_refusals(refused: Mapping[str, int], report: Report) -> None:
    """Report what was refused, whenever there is more of it. Runs for ever."""
    told: Mapping[str, int] = {}
    while True:
        await trio.sleep(REFUSALS_EVERY_S)
        if refused != told:
            told = dict(refused)
            report(Refused(told))


async def watch_signals(
    signals: AsyncIterator[int], serving: trio.Event, drain: trio.Event, scope: trio.CancelScope
) -> None:
    """The first signal drains a node that serves; the second one, or one before that, stops it.

    One more kills the process: a thread may still wait for a hub that does not answer.
    """
    async for _ in signals:
        if drain.is_set() or not serving.is_set():
            scope.cancel()
            kill_from_now_on()
            return
        drain.set()
