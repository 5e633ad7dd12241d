"""Who has which message, whom to offer which, and whom to ask: gossip's lazy half.

A message that is pushed reaches every node over several links; one that is offered by its id goes
over one (Leitao, Pereira, Rodrigues, "Epidemic Broadcast Trees", 2007). Ids travel once a beat,
many at once. Pure state: time is passed in, ids and peers are opaque. What is remembered is
bounded; an id that is forgotten too soon costs a copy, or a second question, and loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

ASK_S = 2.0
"""For an answer to come; then the next who offered the same is asked."""
REMEMBER_S = 15.0
MAX_REMEMBERED = 4096
MAX_OFFERED = 256
"""Ids in one beat; more wait for the next."""

Peer = TypeVar("Peer")


@dataclass
class _Message(Generic[Peer]):
    until: float
    holders: dict[Peer, None] = field(default_factory=dict)  # those that need no offer of ours
    offerers: list[Peer] = field(default_factory=list)  # the next to be asked is first
    asked_until: float | None = None


class Offers(Generic[Peer]):
    """See the module."""

    def __init__(self) -> None:
        self._messages: dict[bytes, _Message[Peer]] = {}  # in the order of their times
        self._fresh: dict[bytes, None] = {}

    def arrived(self, message_id: bytes, peer: Peer, now: float) -> None:
        """A peer sent us a message, or we send it to the peer: it has it."""
        self._message(message_id, now).holders[peer] = None

    def add(self, message_id: bytes, now: float) -> None:
        """We have a message, to be offered with the next beat."""
        self._message(message_id, now).asked_until = None
        self._fresh[message_id] = None
        if len(self._fresh) > MAX_REMEMBERED:
            del self._fresh[next(iter(self._fresh))]

    def take(self, peers: Iterable[Peer]) -> dict[Peer, list[bytes]]:
        """What to offer to each of ``peers`` now: what is new and it does not have."""
        offers: dict[Peer, list[bytes]] = {}
        fresh = list(islice(self._fresh, MAX_OFFERED))
        for peer in peers:
            for message_id in fresh:
                message = self._messages.get(message_id)
                if message is not None:  # else a flood of other ids had it forgotten
                    if peer in message.holders:
                        continue
                    message.holders[peer] = None
                offers.setdefault(peer, []).append(message_id)
        for message_id in fresh:
            del self._fresh[message_id]
        return offers

    def lacking(self, message_id: bytes, peers: Iterable[Peer], now: float) -> list[Peer]:
        """Those of ``peers`` that do not have a message, as far as we know."""
        holders = self._message(message_id, now).holders
        return [peer for peer in peers if peer not in holders]

    def forget(self, peer: Peer) -> None:
        """A peer is gone: nobody knows what it has when it comes back."""
        for message in self._messages.values():
            message.holders.pop(peer, None)
            if peer not in message.offerers:
                continue
            if message.asked_until is not None and message.offerers[0] == peer:
                message.asked_until = -math.inf  # it will not answer: the next beat asks another
            message.offerers.remove(peer)

    def offered(self, message_id: bytes, peer: Peer, now: float) -> bool:
        """A peer offers what we lack: whether to ask it now. If not, another was asked just now."""
        message = self._message(message_id, now)
        message.holders[peer] = None
        if peer not in message.offerers:
            message.offerers.append(peer)
        if message.asked_until is not None:
            return False
        message.asked_until = now + ASK_S
        return True

    def overdue(self, has: Callable[[bytes], bool], now: float) -> dict[Peer, list[bytes]]:
        """Whom to ask for what did not come when asked for, in turn; ``has``: it came since."""
        asking: dict[Peer, list[bytes]] = {}
        for message_id, message in self._messages.items():
            if message.asked_until is None or message.asked_until > now:
                continue
            message.asked_until = None
            if message.offerers and not has(message_id):
                message.asked_until = now + ASK_S
                message.offerers.append(message.offerers.pop(0))
                asking.setdefault(message.offerers[0], []).append(message_id)
        return asking

    def _message(self, message_id: bytes, now: float) -> _Message[Peer]:
        while self._messages and self._oldest.until <= now:
            del self._messages[next(iter(self._messages))]
        found = self._messages.get(message_id)
        if found is None:
            found = self._messages[message_id] = _Message(now + REMEMBER_S)
        if len(self._messages) > MAX_REMEMBERED:
            del self._messages[next(iter(self._messages))]
        return found

    @property
    def _oldest(self) -> _Message[Peer]:
        return next(iter(self._messages.values()))
