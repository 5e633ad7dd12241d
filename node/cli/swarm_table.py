"""A swarm as a table for people: a bar of blocks for each peer, and how many copies there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    lines = [_summary(swarm), *_refusals(swarm), *_blocks(swarm, width)]
    digits = len(f"{swarm.blocks}:{swarm.blocks}")
    for peer in swarm.peers:
        span = f"{peer.blocks[0]}:{peer.blocks[1]}"
        held = bar(*peer.blocks, swarm.blocks, width)
        place = f"{short(peer.peer_id):{ID_CHARS}} {held} {span:>{digits}} {peer.state:8}"
        lines.append(f"{INDENT}{place} {peer.name}".rstrip())
        lines.append(f"{INDENT}{' ' * ID_CHARS} {_facts(peer)}  {peer.use}".rstrip())
    return lines


def short(peer_id: str) -> str:
    """The end of a peer id, which is what tells two apart."""
    return "…" + peer_id[-6:]


def _summary(swarm: Swarm) -> str:
    holes = missing(swarm.copies)
    covered = "covered" if swarm.covered else "NOT covered"
    lacking = f": nobody serves {ranges(holes)}" if holes else ""
    blocks, peers = many(swarm.blocks, "block"), many(len(swarm.peers), "peer")
    return f"{swarm.model}: {blocks}, {peers}, {covered}{lacking}"


def many(count: int, thing: str) -> str:
    """As in "1 peer" or "2 peers"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _refusals(swarm: Swarm) -> list[str]:
    if not swarm.refused:
        return []
    clock = (
        " (is this machine's clock right?)" if {"future", "expired"} & set(swarm.refused) else ""
    )
    return [f"{INDENT}refused: {counted(swarm.refused)}{clock}"]


def counted(refused: Mapping[str, int]) -> str:
    """As in "12 flood, 1 size": the most frequent first."""
    by_number = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {reason}" for reason, number in by_number)


def _blocks(swarm: Swarm, width: int) -> list[str]:
    if not swarm.copies:
        return []
    least = [min(swarm.copies[a:b]) for a, b in columns(swarm.blocks, width)]
    digits = "".join("+" if count > 9 else str(count) for count in least)
    return [f"{INDENT}{'copies':{ID_CHARS}} {digits}"]


def _facts(peer: PeerInfo) -> str:
    rtt = "     ?" if peer.rtt_ms is None else f"{peer.rtt_ms:6.1f}"
    weights = peer.dtype if peer.quant == "none" else peer.quant
    extras = [weights or peer.quant, *(f"adapter {name}" for name in peer.adapters)]
    if peer.moving_to is not None and peer.moving_to != peer.blocks:
        extras.append(f"moving to {peer.moving_to[0]}:{peer.moving_to[1]}")
    if peer.pinned:
        extras.append("pinned")
    return (
        f"{rtt} ms {peer.throughput:8.1f} tok/s {about(peer.kv_tokens_free):>6} kv  "
        f"{', '.join(extras)}"
    )


def about(count: int) -> str:
    """As in "987" or "1.5M"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


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
