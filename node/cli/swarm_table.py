"""A swarm as a table for people: a bar of blocks for each peer, and how many copies there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from petalnode.events import PeerInfo, Swarm

BAR_WIDTH = 48
"""Columns at most; in a deeper model each stands for several blocks."""
ALL, SOME, NONE = "█", "▌", "·"
INDENT = "  "
ID_CHARS = 7
"""Of ``short``."""


def swarm_lines(swarm: Swarm) -> list[str]:
    """Line by line: the whole, the blocks, then two lines a peer."""
    width = min(BAR_WIDTH, max(1, swarm.blocks))
    lines = [_summary(swarm), *_blocks(swarm, width)]
    for peer in swarm.peers:
        lines.append(_peer(peer, swarm.blocks, width))
        lines.append(f"{INDENT}{' ' * ID_CHARS} {peer.use}")
    return lines


def short(peer_id: str) -> str:
    """The end of a peer id, which is what tells two apart."""
    return "…" + peer_id[-6:]


def _summary(swarm: Swarm) -> str:
    holes = missing(swarm.copies)
    covered = "covered" if swarm.covered else "NOT covered"
    lacking = f": nobody serves {ranges(holes)}" if holes else ""
    return f"{swarm.model}: {swarm.blocks} blocks, {len(swarm.peers)} peers, {covered}{lacking}"


def _blocks(swarm: Swarm, width: int) -> list[str]:
    if not swarm.copies:
        return []
    least = [min(swarm.copies[a:b]) for a, b in columns(swarm.blocks, width)]
    digits = "".join("+" if count > 9 else str(count) for count in least)
    return [f"{INDENT}{'copies':{ID_CHARS}} {digits}"]


def _peer(peer: PeerInfo, blocks: int, width: int) -> str:
    start, end = peer.blocks
    rtt = "     ?" if peer.rtt_ms is None else f"{peer.rtt_ms:6.1f}"
    weights = peer.dtype if peer.quant == "none" else peer.quant
    extras = [weights or peer.quant, *(f"adapter {name}" for name in peer.adapters)]
    if peer.moving_to is not None and peer.moving_to != peer.blocks:
        extras.append(f"moving to {peer.moving_to[0]}:{peer.moving_to[1]}")
    if peer.pinned:
        extras.append("pinned")
    return (
        f"{INDENT}{short(peer.peer_id):{ID_CHARS}} {bar(start, end, blocks, width)} "
        f"{start}:{end} {peer.state} {rtt} ms {peer.throughput:8.1f} tok/s "
        f"{peer.kv_tokens_free:8} kv  {', '.join(extras)}  {peer.name}"
    ).rstrip()


def bar(start: int, end: int, blocks: int, width: int) -> str:
    """Which of the blocks are in ``[start, end)``."""
    signs = []
    for a, b in columns(blocks, width):
        held = max(0, min(b, end) - max(a, start))
        signs.append(ALL if held == b - a else SOME if held else NONE)
    return "".join(signs)


def columns(blocks: int, width: int) -> list[tuple[int, int]]:
    """The blocks ``[a, b)`` that each column stands for."""
    edges = [blocks * column // width for column in range(width + 1)]
    return list(pairwise(edges))


def missing(copies: Sequence[int]) -> list[int]:
    """The blocks without any copy."""
    return [block for block, count in enumerate(copies) if count == 0]


def ranges(blocks: Sequence[int]) -> str:
    """As in "3:6, 9:10"; ``blocks`` ascend."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1][1] = block + 1
        else:
            spans.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in spans)
