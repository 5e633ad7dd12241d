"""When a node announces itself, on a virtual clock."""

from itertools import pairwise
from random import Random
from typing import Any

import trio

from petalnode.announcing import FREE_TOKENS, FULL_TOKENS, MIN_GAP_S, Announcer
from petalnode.routing.beats import BEAT_S, JITTER, MISSED_BEATS, beat_interval
from petalnode.routing.view import SwarmView

from ..routing.records import record


class FakeGossip:
    """Keeps what was published, and when."""

    def __init__(self) -> None:
        self.view = SwarmView()
        self.times: list[float] = []

    async def publish(self, announcement: Any) -> Any:
        self.times.append(trio.current_time())
        self.view.apply(announcement, trio.current_time(), b"")
        return announcement


class Node:
    """Something to announce; ``room`` may be changed."""

    def __init__(self) -> None:
        self.gossip = FakeGossip()
        self.announcer = Announcer(self.gossip, Random(1))
        self.room = FREE_TOKENS
        self.seq = 0

    def record(self):
        self.seq += 1
        return record("own", kv_tokens_free=self.room, seq=self.seq, ttl_s=self.announcer.ttl_s)

    async def live(self, seconds: float) -> list[float]:
        """The times of announcements in so many seconds."""
        started = trio.current_time()
        with trio.move_on_after(seconds):
            await self.announcer.beat(self.record, lambda: self.room)
        return [time - started for time in self.gossip.times]


async def test_a_small_swarm_hears_a_node_every_few_seconds(autojump_clock):
    times = await Node().live(100)
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= BEAT_S * (1 - JITTER)
    assert max(gaps) <= BEAT_S * (1 + JITTER)
    assert len(set(gaps)) > 10


async def test_a_large_swarm_hears_it_seldom_but_before_its_record_expires(autojump_clock):
    node = Node()
    for number in range(199):
        node.gossip.view.apply(record(f"p{number}", ttl_s=10_000.0), 0.0, b"")
    times = await node.live(2000)
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= beat_interval(200) * (1 - JITTER)
    assert max(gaps) <= node.announcer.ttl_s / MISSED_BEATS + 1e-6


async def test_an_accusation_is_answered_at_once_and_slander_makes_no_flood(autojump_clock):
    node = Node()

    async def accuse():
        await trio.sleep(2)
        for _ in range(100):
            node.gossip.on_accused()
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accuse)
        times = await node.live(3.5)
    assert times[:2] == [0, 2]
    assert len(times) == 3
    assert times[2] == 2 + MIN_GAP_S


async def test_full_and_free_again_are_told_soon_and_nothing_between(autojump_clock):
    node = Node()

    async def fill():
        await trio.sleep(0.5)
        node.room = FULL_TOKENS - 1
        await trio.sleep(1)
        node.room = FREE_TOKENS - 1
        await trio.sleep(1)
        node.room = FREE_TOKENS

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        times = await node.live(3.9)
    assert times == [0, 1, 3]


async def test_what_was_said_a_moment_ago_is_not_said_again(autojump_clock):
    """A newcomer tells what it will load, then begins to beat; and it goes online when it can."""
    node = Node()

    async def go_online():
        await trio.sleep(3)
        await node.announcer.publish(node.record())

    await node.announcer.publish(node.record())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_online)
        times = await node.live(3 + BEAT_S * (1 + JITTER))
    assert times[:2] == [0, 3]
    assert len(times) == 3
    assert times[2] - times[1] >= BEAT_S * (1 - JITTER)
