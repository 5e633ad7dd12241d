"""What a hop costs, peer by peer: the terms of the sum that chain search minimises.

One token's time through a chain is the sum of

    one-way delays              client to first hop, hop to hop, last hop to client  (``delays``)
    + VISIT_S                   a hop: reading, queueing, sending
    + blocks x seconds a block  under load: announced speed of the whole span, queue depth, and what
                                was measured here where that is slower  (``speeds``)
    + bytes / bandwidth         at both ends of a leg, where a bandwidth was measured

For bulk work the busiest visit counts too (``Prices.stage_s``, ``bulk``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from petalnode.routing.announcement import Announcement
from petalnode.routing.coordinates import Floats, Indices
from petalnode.routing.speeds import believed_block_s

Flags = NDArray[np.bool_]

VISIT_S = 0.002
"""Of passing through a peer, however few blocks it computes."""
QUEUE_SHARE = 0.5
"""How much of its own time each waiting piece of work adds: batching shares the rest."""
SUSPECT_S = 1.0
"""Handicap of a peer that is said to be dead: others first, but it alone is better than none."""


@dataclass(frozen=True)
class Workload:
    """What a session asks of every hop.

    ``kv_tokens``: tokens of attention cache, all rows together. ``context``: the longest position
    plus one. ``exact``: unquantized weights only. ``token_bytes``: hidden states of one token on
    the wire. ``bulk_tokens``: how many are sent at once where throughput matters and not latency
    (training, a long prefill), 0 for decoding.
    """

    kv_tokens: int = 0
    context: int = 0
    adapters: tuple[str, ...] = ()
    exact: bool = False
    token_bytes: int = 0
    bulk_tokens: int = 0

    @property
    def bulk(self) -> bool:
        """Whether throughput matters, not latency."""
        return self.bulk_tokens > 0


ANYTHING = Workload()
"""A session without any demands."""


@dataclass(frozen=True)
class Knowledge:
    """What this node knows by itself, beyond what the peers say.

    ``rtts`` are its measured round trips in seconds, ``decode_s`` and ``forward_s`` its measured
    seconds a block and token (``speeds``). ``banned`` says why, as in "banned for 14 s more: its
    connection was lost" (``health``); ``suspected`` are said to be dead (``suspicion``).
    """

    own_id: str = ""
    rtts: Mapping[str, float] = field(default_factory=dict)
    decode_s: Mapping[str, float] = field(default_factory=dict)
    forward_s: Mapping[str, float] = field(default_factory=dict)
    banned: Mapping[str, str] = field(default_factory=dict)
    suspected: Collection[str] = ()


class Columns:
    """The records as arrays, one row a peer. ``decode_s``, ``forward_s``: said seconds a block."""

    def __init__(self, records: Sequence[Announcement]) -> None:
        self.records = records
        self.index = {a.peer_id: k for k, a in enumerate(records)}
        self.start = _integers([a.start for a in records])
        self.end = _integers([a.end for a in records])
        self.length = self.end - self.start
        self.online = np.array([a.state == "online" for a in records], dtype=bool)
        self.exact = np.array([a.quant == "none" for a in records], dtype=bool)
        self.context = _integers([a.max_context for a in records])
        self.kv_tokens = _integers([a.kv_tokens_free for a in records])
        self.decode_s = 1 / (np.array([a.decode_tps for a in records]) * self.length)
        self.forward_s = 1 / (np.array([a.forward_tps for a in records]) * self.length)
        self.load = 1 + QUEUE_SHARE * np.array([a.queue_depth for a in records], dtype=float)
        bandwidth = np.array([a.bandwidth for a in records], dtype=float)
        self.byte_s = np.divide(1.0, bandwidth, out=np.zeros(len(records)), where=bandwidth > 0)

    def spread(self, values: Mapping[str, float]) -> Floats:
        """Values by peer id as a column, 0 where there is none."""
        column = np.zeros(len(self.records))
        for peer_id, value in values.items():
            if peer_id in self.index:
                column[self.index[peer_id]] = value
        return column

    def mark(self, peer_ids: Collection[str]) -> Flags:
        """Which rows these peers are."""
        marked = np.zeros(len(self.records), dtype=bool)
        marked[[self.index[p] for p in peer_ids if p in self.index]] = True
        return marked


@dataclass(frozen=True)
class Prices:
    """Costs [P] of a workload in seconds a token; ``enter`` is infinite for peers that do not fit.

    ``cap`` is the most blocks of one hop, as far as room for attention cache goes.
    """

    enter: Floats
    leave: Floats
    block_s: Floats
    cap: Indices

    def stage_s(self, blocks: Indices | int) -> Floats:
        """How long one token keeps the peer, or its link, busy."""
        return np.maximum(self.block_s * blocks, self.leave)


def price(
    columns: Columns, workload: Workload, known: Knowledge, exclude: Collection[str]
) -> Prices:
    """What each peer costs, or that it is out of the question; ``why_not`` says why."""
    fits = columns.online & (columns.context >= workload.context)
    fits &= ~(columns.mark(known.banned) | columns.mark(exclude))
    if workload.exact:
        fits &= columns.exact
    if workload.adapters:
        wanted = set(workload.adapters)
        fits &= np.array([wanted.issubset(a.adapters) for a in columns.records], dtype=bool)
    cap = columns.length
    if workload.kv_tokens > 0:
        cap = np.minimum(cap, columns.kv_tokens * columns.length // workload.kv_tokens)
        fits &= cap > 0
    said = columns.forward_s if workload.bulk else columns.decode_s
    measured = columns.spread(known.forward_s if workload.bulk else known.decode_s)
    block_s = believed_block_s(said, measured, columns.load)
    bytes_s = workload.token_bytes * columns.byte_s
    enter = VISIT_S + bytes_s + SUSPECT_S * columns.mark(known.suspected)
    return Prices(np.where(fits, enter, np.inf), bytes_s, block_s, cap)


def why_not(
    a: Announcement, workload: Workload, known: Knowledge, exclude: Collection[str] = ()
) -> str | None:
    """Why a peer is out of the question, in a few words; None if it is not."""
    if a.state != "online":
        return f"it is {a.state}"
    if a.peer_id in known.banned:
        return known.banned[a.peer_id]
    if a.peer_id in exclude:
        return "excluded from this search"
    if a.max_context < workload.context:
        return f"its context ends at {a.max_context} tokens, {workload.context} are needed"
    if workload.exact and a.quant != "none":
        return f"its weights are quantized ({a.quant})"
    missing = sorted(set(workload.adapters) - set(a.adapters))
    if missing:
        return f"it lacks adapter {missing[0]}"
    if a.kv_tokens_free * (a.end - a.start) < workload.kv_tokens:
        return f"no room for {workload.kv_tokens} tokens"
    return None


def _integers(values: list[int]) -> Indices:
    return np.array(values, dtype=np.intp)
