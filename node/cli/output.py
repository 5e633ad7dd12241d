"""Events for a program (JSON lines on stdout) or for a person (sentences on stderr)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from petalnode import events
from petalnode.cli.swarm_table import counted, short, swarm_lines
from petalnode.events import Event, Report
from petalnode.models.memory import readable_bytes

BAR_WIDTH = 24
CLEAR_TO_END = "\x1b[K"
"""Tells a terminal to forget what else is on the line (ECMA-48, erase in line)."""


class SearchDone(events.Done):
    """Of a beam search: its tokens come in no steady flow, so the rate is over the whole time."""


def reporter(as_json: bool) -> Report:
    """The ``Report`` that suits what was asked for."""
    return print_json if as_json else print_human


def print_json(event: Event) -> None:
    """One JSON object on stdout, flushed: a reader sees it as it happens."""
    print(json.dumps(event.to_json()), flush=True)


def print_human(event: Event) -> None:
    """A line on stderr, a progress bar while loading, or a token's text on stdout."""
    say = SENTENCES.get(type(event))
    if say is not None:
        say(event)


def note(text: str) -> None:
    """A line on stderr."""
    end_progress()
    print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """The line that a terminal's stderr shows again and again; nothing where it is no terminal."""

    def __init__(self) -> None:
        self._unfinished = False

    def show(self, text: str, last: bool) -> None:
        """Write the text over the one before it."""
        if sys.stderr.isatty():
            end = "\n" if last else ""
            print(f"\r{text}{CLEAR_TO_END}", end=end, file=sys.stderr, flush=True)
            self._unfinished = not last

    def end(self) -> None:
        """Let what follows begin on a line of its own."""
        if self._unfinished:
            print(file=sys.stderr, flush=True)
            self._unfinished = False


_progress = ProgressLine()
end_progress = _progress.end


def span(blocks: tuple[int, int]) -> str:
    """``blocks 0:4``."""
    return f"blocks {blocks[0]}:{blocks[1]}"


def amount(count: int, what: str) -> str:
    """``1 step``, ``1,200 steps``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _listening(event: events.Listening) -> None:
    for addr in event.addrs:
        note(f"listening on {addr}")
    if event.addrs:
        note(f"another machine joins with: --join {event.invite}")


def _memory(event: events.Memory) -> None:
    asked = "" if event.blocks == event.fits else f"; {event.blocks} were asked for"
    form = event.dtype if event.quant == "none" else f"{event.quant} and {event.dtype}"
    sizes = (event.free, event.loading, event.kv, event.block)
    free, loading, kv, block = map(readable_bytes, sizes)
    if event.adapters:
        form += f", {readable_bytes(event.adapters)} of that for adapters"
    note(
        f"memory: {free} free on {event.device}, less {loading} to read a block and {kv} for "
        f"attention caches; a block takes {block} in {form}, so {event.fits} of {event.of} blocks "
        f"fit{asked}"
    )
    if event.left_dense:
        names = ", ".join(event.left_dense[:3]) + (", …" if event.left_dense[3:] else "")
        note(f"left in {event.dtype}, for want of rows of a multiple of 64 numbers: {names}")


def _loading(event: events.Loading) -> None:
    filled = BAR_WIDTH * event.done // max(event.total, 1)
    bar = "█" * filled + "░" * (BAR_WIDTH - filled)
    text = f"loading {span(event.blocks)} {bar} {event.done}/{event.total}"
    _progress.show(text, last=event.done == event.total)


def _downloading(event: events.Downloading) -> None:
    share = 100 * event.done // max(event.total, 1)
    text = f"downloading {event.done / 1e6:,.0f} of {event.total / 1e6:,.0f} MB {share} %"
    _progress.show(f"{text} ({event.file})", last=event.done == event.total)


def _ready(event: events.Ready) -> None:
    weights = event.memory["weights"] / 2**20
    peak = event.memory["peak"] / 2**20
    note(
        f"ready: {short(event.peer_id)} serves {span(event.blocks)} of {event.model}, "
        f"{event.throughput['decode']:.0f} tokens/s; weights {weights:.0f} MiB, peak {peak:.0f} MiB"
        + (f"; offers {', '.join(event.adapters)}" if event.adapters else "")
    )


def _draining(event: events.Draining) -> None:
    note(f"draining: {amount(event.sessions, 'session')} open; Ctrl-C again to stop at once")


def _moving(event: events.Moving) -> None:
    have = "has" if event.sessions == 1 else "have"
    wait = f", once {amount(event.sessions, 'session')} {have} ended" if event.sessions else ""
    note(f"moving from {span(event.blocks)} to {span(event.to)}, which the swarm needs more{wait}")


def _refused(event: events.Refused) -> None:
    note(f"gossip refused so far: {counted(event.counts)}")


def _stopped(event: events.Stopped) -> None:
    note("stopped")


def _waiting(event: events.Waiting) -> None:
    note(f"waiting up to {event.for_s:.0f} s: {event.why}")


def _route(event: events.Route) -> None:
    note("route: you → " + " → ".join(map(_hop, event.hops)) + " → you")


def _hop(hop: events.HopInfo) -> str:
    rtt = "" if hop.rtt_ms is None else f", {hop.rtt_ms:.1f} ms"
    return f"{short(hop.peer_id)} ({span(hop.blocks)}{rtt})"


def _recovered(event: events.Recovered) -> None:
    lost = ", ".join(map(short, event.lost))
    what = f"lost {lost}; others took over" if lost else "two hops lost sight of each other; mended"
    note(f"\n  [{what} in {event.stall_ms:.0f} ms, the text goes on]")


def _lost(event: events.HopLost) -> None:
    note(f"lost {short(event.peer_id)}, which trained {span(event.blocks)}: {event.why}")
    note("  its part is computed again by others; the numbers are the same")


def _token(event: events.TokenEvent) -> None:
    print(event.text, end="", flush=True)


def _done(event: events.Done) -> None:
    in_all = isinstance(event, SearchDone)
    rate = f"{event.tokens_per_s:.1f} tokens/s"
    print(flush=True)
    note(
        f"{amount(len(event.tokens), 'token')} ({event.finish_reason}), first after "
        f"{event.ttft_ms:.0f} ms, {rate + ' in all' if in_all else 'then ' + rate}"
    )


def _swarm(event: events.Swarm) -> None:
    print("\n".join(swarm_lines(event)), flush=True)


SENTENCES: dict[type[Event], Callable[..., None]] = {
    events.Listening: _listening,
    events.Memory: _memory,
    events.Downloading: _downloading,
    events.Loading: _loading,
    events.Ready: _ready,
    events.Draining: _draining,
    events.Moving: _moving,
    events.Refused: _refused,
    events.Stopped: _stopped,
    events.Waiting: _waiting,
    events.Route: _route,
    events.Recovered: _recovered,
    events.HopLost: _lost,
    events.TokenEvent: _token,
    events.Done: _done,
    SearchDone: _done,
    events.Swarm: _swarm,
}
