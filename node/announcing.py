"""When this node announces itself: in its turn, and at once when something changed that matters.

Changes of state and span are published by whoever makes them (``publish``). The rest rides on the
next beat, but for two things: an accusation of being dead is answered at once, and so is the moment
when the attention cache is full, or free again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import trio

from petalnode.p2p.gossip import Gossip
from petalnode.routing.announcement import Announcement
from petalnode.routing.beats import Census, next_beat, record_ttl

CHECK_S = 1.0
"""How often a node looks whether its cache is full."""
MIN_GAP_S = 1.0
"""Between two announcements of a node whose state does not change, whatever happens."""
FULL_TOKENS = 128
"""With less room than this a peer is of no use to a new session."""
FREE_TOKENS = 512


class Announcer:
    """Publishes this node's records. ``said`` is the last one, None before the first.

    ``census`` is filled by whoever dials peers.
    """

    def __init__(self, gossip: Gossip, rng: Random) -> None:
        self.said: Announcement | None = None
        self.census = Census()
        self._gossip = gossip
        self._rng = rng
        self._urgent = trio.Event()
        self._spoke_at = -math.inf
        gossip.on_accused = self.hurry

    @property
    def ttl_s(self) -> float:
        """How long a record published now should live."""
        return record_ttl(self._swarm_size())

    def hurry(self) -> None:
        """Announce us as soon as ``MIN_GAP_S`` allows. Does not block."""
        self._urgent.set()

    async def publish(self, announcement: Announcement) -> None:
        """Tell the swarm at once. Raises InvalidAnnouncement if it does not follow the last one."""
        self.said = await self._gossip.publish(announcement)
        self._spoke_at = trio.current_time()

    async def beat(self, announce: Callable[[], Announcement], room: Callable[[], int]) -> None:
        """Publish what ``announce`` says, again and again. Runs for ever.

        Whatever was published meanwhile counts as a beat. ``room`` is how many tokens of attention
        cache are free.
        """
        while True:
            await self._wait_turn(next_beat(self._swarm_size(), self._rng), room)
            await trio.sleep_until(self._spoke_at + MIN_GAP_S)
            await self.publish(announce())

    async def _wait_turn(self, interval_s: float, room: Callable[[], int]) -> None:
        while (due := self._spoke_at + interval_s) > trio.current_time():
            with trio.move_on_at(min(due, trio.current_time() + CHECK_S)):
                await self._urgent.wait()
                self._urgent = trio.Event()
                return
            if self.said is not None and fullness_changed(self.said.kv_tokens_free, room()):
                return

    def _swarm_size(self) -> int:
        return self.census.size(len(self._gossip.view.live(trio.current_time())))


def fullness_changed(said: int, now: int) -> bool:
    """Whether a peer with so many free tokens became too full for another session, or has room
    again."""
    if said < FULL_TOKENS:
        return now >= FREE_TOKENS
    return now < FULL_TOKENS
