"""Which peers a session goes through: the exact least cost, by the terms in ``costs``.

``Router`` keeps what is costly to make between searches: the delays among all peers. Those change
when spans or announced round trips do, not with every beat.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from petalnode.errors import NoRoute
from petalnode.routing.announcement import Announcement
from petalnode.routing.bulk import busiest_stage, solve_bulk
from petalnode.routing.coordinates import Floats
from petalnode.routing.costs import ANYTHING, Columns, Knowledge, Prices, Workload, price, why_not
from petalnode.routing.delays import UNKNOWN_RTT_S, estimate_delays
from petalnode.routing.graph import Graph
from petalnode.routing.search import Found, Problem, solve

SPREAD = 0.1
"""Chains that cost at most this share more than the best are as good: sessions spread over them."""
MAX_CANDIDATES = 512
"""Peers that are compared; of more, the nearest and fastest for every block."""
MIN_PER_BLOCK = 4
STEADY = 0.2
"""Share by which our own round trips may change before all delays are estimated anew."""


@dataclass(frozen=True)
class Hop:
    """One stage of a chain: ``peer_id`` runs blocks ``[start, end)``, a part of its span.

    ``rtt_s`` is the round trip from here, None while unmeasured.
    """

    peer_id: str
    start: int
    end: int
    rtt_s: float | None = None


@dataclass(frozen=True)
class Route:
    """A chain, what a token costs in it, and how long it keeps the busiest hop busy; seconds."""

    hops: tuple[Hop, ...]
    cost_s: float
    stage_s: float


@dataclass(frozen=True)
class Gap:
    """Blocks ``[first, last)`` to cover between two peers, None meaning this node."""

    first: int
    last: int
    sender: str | None = None
    receiver: str | None = None

    @property
    def ends(self) -> set[str]:
        """The peers at both ends, which have their part in the session already."""
        return {peer_id for peer_id in (self.sender, self.receiver) if peer_id is not None}


class Router:
    """Finds chains over a model of ``num_blocks`` blocks. Pure: all knowledge is passed in."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._columns = Columns(())
        self._graph: Graph | None = None
        self._rtts: Mapping[str, float] = {}

    def find(
        self,
        records: Iterable[Announcement],
        known: Knowledge,
        workload: Workload = ANYTHING,
        *,
        gap: Gap | None = None,
        exclude: Collection[str] = (),
        rng: random.Random | None = None,
    ) -> Route:
        """The best chain over all blocks, or over those of ``gap`` (to replace lost hops).

        With ``rng`` one of the chains within ``SPREAD`` of the best, so that sessions do not all
        meet at the same peers; without, the best. Raises NoRoute, which names the blocks.
        """
        gap = gap or Gap(0, self.num_blocks)
        everyone = list(records)
        exclude = gap.ends.union(exclude)
        problem = self.problem(everyone, known, workload, gap, exclude)
        wanted = problem if rng is None else _shaken(problem, rng)
        found = solve_bulk(wanted, workload.bulk_tokens) if workload.bulk else solve(wanted)
        if found is None:
            raise no_route(everyone, self.num_blocks, gap, workload, known, exclude)
        return self._route(found, problem, known)

    def problem(
        self,
        records: Sequence[Announcement],
        known: Knowledge,
        workload: Workload,
        gap: Gap,
        exclude: Collection[str],
    ) -> Problem:
        """What ``find`` solves, for those who want to explain its answer."""
        candidates = shortlist(records, self.num_blocks, known.rtts)
        graph = self._updated(candidates, known)
        prices = price(self._columns, workload, known, exclude)
        here = self._from_here(graph, known.rtts)
        sender, receiver = (self._end(peer, here) for peer in (gap.sender, gap.receiver))
        return Problem(graph, prices, gap.first, gap.last, sender, receiver)

    @property
    def columns(self) -> Columns:
        """The peers of the last search: its numbers count these."""
        return self._columns

    def _updated(self, records: Sequence[Announcement], known: Knowledge) -> Graph:
        before = self._columns
        if records != before.records:
            self._columns = Columns(records)
        graph = self._graph
        if graph is None or not (
            _same_places(before.records, self._columns.records) and _steady(self._rtts, known.rtts)
        ):
            places = graph.delays.places if graph else None
            columns = self._columns
            delays = estimate_delays(columns.records, known.own_id, known.rtts, places)
            graph = Graph(columns.start, columns.end, self.num_blocks, delays)
            self._graph, self._rtts = graph, dict(known.rtts)
        return graph

    def _from_here(self, graph: Graph, rtts: Mapping[str, float]) -> Floats:
        """One-way delays to every peer, with our latest measurements."""
        here = graph.delays.here.copy()
        for peer_id, rtt_s in rtts.items():
            if peer_id in self._columns.index:
                here[self._columns.index[peer_id]] = rtt_s / 2
        return here

    def _end(self, peer_id: str | None, here: Floats) -> Floats:
        if peer_id is None:
            return here
        assert self._graph is not None
        number = self._columns.index.get(peer_id)
        if number is None:
            return np.full(len(here), UNKNOWN_RTT_S / 2)
        delays: Floats = self._graph.delays.between[number]
        return delays

    def _route(self, found: Found, problem: Problem, known: Knowledge) -> Route:
        names = [a.peer_id for a in self._columns.records]
        hops = tuple(
            Hop(names[peer], start, end, known.rtts.get(names[peer]))
            for peer, start, end in found.visits
        )
        return Route(hops, cost_of(problem, found), busiest_stage(problem.prices, found))


def uncovered(announcements: Iterable[Announcement], num_blocks: int) -> tuple[int, ...]:
    """The blocks of ``[0, num_blocks)`` that are in no span."""
    covered = {block for a in announcements for block in range(a.start, a.end)}
    return tuple(block for block in range(num_blocks) if block not in covered)


def cost_of(problem: Problem, found: Found) -> float:
    """The sum of costs along a chain, in seconds a token."""
    prices, apart = problem.prices, problem.graph.apart
    visits = found.visits
    total = problem.sender[visits[0].peer] + problem.receiver[visits[-1].peer]
    for visit in visits:
        total += prices.enter[visit.peer] + prices.leave[visit.peer]
        total += prices.block_s[visit.peer] * (visit.end - visit.start)
    for one, two in itertools.pairwise(visits):
        total += apart[two.peer, one.peer]
    return float(total)


def shortlist(
    records: Sequence[Announcement], num_blocks: int, rtts: Mapping[str, float]
) -> list[Announcement]:
    """The peers worth comparing, by id: all, or, of more than ``MAX_CANDIDATES``, about as many.

    Every block keeps its nearest and fastest holders, and ``MIN_PER_BLOCK`` of them in any case.
    """
    serving = [a for a in records if a.end <= num_blocks]
    if any(a.peer_id >= b.peer_id for a, b in itertools.pairwise(serving)):
        # Ordered by id, and of several records of one peer the newest: the last one wins.
        newest = {a.peer_id: a for a in sorted(serving, key=lambda a: (a.peer_id, a.seq))}
        serving = list(newest.values())
    if len(serving) <= MAX_CANDIDATES:
        return serving
    spans = sum(a.end - a.start for a in serving) / len(serving)
    quota = max(MIN_PER_BLOCK, round(MAX_CANDIDATES * spans / num_blocks))
    counts = [0] * num_blocks
    chosen = []

    def rank(a: Announcement) -> tuple[bool, float, str]:
        distant = rtts.get(a.peer_id, UNKNOWN_RTT_S)
        return a.state != "online", distant + 1 / a.decode_tps, a.peer_id

    for a in sorted(serving, key=rank):
        blocks = range(a.start, a.end)
        if any(counts[block] < quota for block in blocks):
            chosen.append(a)
            for block in blocks:
                counts[block] += 1
    return sorted(chosen, key=lambda a: a.peer_id)


def no_route(
    records: Sequence[Announcement],
    num_blocks: int,
    gap: Gap,
    workload: Workload,
    known: Knowledge,
    exclude: Collection[str],
) -> NoRoute:
    """The error that says which blocks are missing, or what keeps their peers from serving."""
    serving = [a for a in records if a.end <= num_blocks]
    remedy = "Start a node that holds them, or wait for one to join."
    online = [a for a in serving if a.state == "online" and a.peer_id not in exclude]
    missing = _of_gap(uncovered(online, num_blocks), gap)
    if missing:
        return NoRoute(f"{_in_words(missing)} served by nobody.", remedy, missing)
    fitting = [a for a in online if why_not(a, workload, known) is None]
    missing = _of_gap(uncovered(fitting, num_blocks), gap)
    lost = [a for a in online if any(a.start <= block < a.end for block in missing)]
    if missing:
        reason = why_not(lost[0], workload, known)
        if workload.adapters and why_not(lost[0], replace(workload, adapters=()), known) is None:
            remedy = "Offer it there with `petalnode run --adapter`, or give your own directory."
        cause = f"{_in_words(missing)} served only by peers that cannot take this session"
        return NoRoute(f"{cause}; of {lost[0].peer_id}: {reason}.", remedy, missing)
    if not workload.kv_tokens:
        return NoRoute("No chain leads through the peers that hold the blocks.", remedy)
    cause = f"The peers have no chain with room for {workload.kv_tokens} tokens."
    return NoRoute(cause, "Shorten the session, or wait for others to end.")


def _of_gap(blocks: Iterable[int], gap: Gap) -> tuple[int, ...]:
    return tuple(block for block in blocks if gap.first <= block < gap.last)


def _shaken(problem: Problem, rng: random.Random) -> Problem:
    """The problem with each peer's own costs raised by up to ``SPREAD``, each by its own draw.

    Whatever is cheapest then costs at most that share more than the cheapest before.
    """
    prices: Prices = problem.prices
    raised = 1 + SPREAD * np.array([rng.random() for _ in prices.enter])
    shaken = replace(prices, enter=prices.enter * raised, block_s=prices.block_s * raised)
    return replace(problem, prices=shaken)


def _same_places(before: Sequence[Announcement], now: Sequence[Announcement]) -> bool:
    return len(before) == len(now) and all(
        a is b
        or (a.peer_id == b.peer_id and (a.start, a.end) == (b.start, b.end) and a.rtts == b.rtts)
        for a, b in zip(before, now, strict=True)
    )


def _steady(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    return before.keys() == now.keys() and all(
        abs(now[peer_id] - rtt_s) <= STEADY * rtt_s for peer_id, rtt_s in before.items()
    )


def _in_words(blocks: Sequence[int]) -> str:
    """As in "Blocks 3 to 5 and block 9 are"; ``blocks`` ascend."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block - 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    words = [f"block {a}" if a == b else f"blocks {a} to {b}" for a, b in ranges]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{listed[0].upper()}{listed[1:]} {'is' if len(blocks) == 1 else 'are'}"
