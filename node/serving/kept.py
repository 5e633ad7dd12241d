"""Forward passes whose backward may come: what a node keeps of them, and for how long.

They save the way back a second forward pass. Nothing is owed to anybody: where there is no room,
the oldest pass of the peer that keeps most goes, and its client sends the input once more.

While the node has nothing else to do, it computes activations of these passes again, ahead of the
gradient: a hop waits for those behind it, and so the work is off the way of whoever waits for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from petalnode.compute import Load
from petalnode.models.training import ForwardPass
from petalnode.serving.engine import Turn
from petalnode.training.protocol import Job

MAX_KEPT_BYTES = 1 << 30
"""Of all sessions together."""
MAX_AHEAD_BYTES = 1 << 28
"""Of activations that are there before their gradient is."""


class Owner(Protocol):
    """A session; all of one peer's share what is kept for that peer."""

    client: str


Key = tuple[Owner, int]
"""A session, and the number of its job."""


@dataclass(eq=False)
class Kept:
    """A pass, the job that it was made by, and what is charged for it and its activations."""

    job: Job
    forward: ForwardPass
    nbytes: int
    ahead: int = 0


class KeptPasses:
    """The passes of all sessions of a node, ``size`` bytes at most, by session and job, and up to
    ``ahead_size`` bytes of activations that they will need.

    One that was taken counts until it is given back: it is in memory as long as somebody uses it.
    """

    def __init__(self, size: int = MAX_KEPT_BYTES, ahead_size: int = MAX_AHEAD_BYTES) -> None:
        self.size, self.ahead_size = size, ahead_size
        self.ahead = 0
        """Bytes of activations charged."""
        self._passes: dict[Key, Kept] = {}
        self._taken: dict[Owner, int] = {}
        self._bytes: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """Bytes."""
        return self._bytes.total()

    def put(self, owner: Owner, job: Job, forward: ForwardPass, nbytes: int) -> None:
        """Keep a pass, and let others go for it where they must.

        It is not kept where its peer would have most, and has nothing older to let go.
        """
        self._drop((owner, job.id))
        if nbytes > self.size:
            return
        self._charge(owner, nbytes)
        while self.used > self.size:
            most = max(self._bytes, key=self._bytes.__getitem__)
            oldest = next((key for key in self._passes if key[0].client == most), None)
            if oldest is None:
                self._charge(owner, -nbytes)
                return
            self._drop(oldest)
        self._passes[owner, job.id] = Kept(job, forward, nbytes)
        self._taken[owner] = self._taken.pop(owner, 0)

    def take(self, owner: Owner, back: Job) -> Kept | None:
        """What a backward job goes back through, if it is here; nobody else gets it then. Whoever
        took it gives it back."""
        kept = self._passes.get((owner, back.of))
        if kept is None:
            return None
        there = kept.job
        same = (there.start, there.end, there.lengths, there.version)
        if same != (back.start, back.end, back.lengths, back.version):
            return None
        self._taken.pop(owner)
        self._taken[owner] = back.of
        return self._passes.pop((owner, back.of))

    def give_back(self, owner: Owner, kept: Kept) -> None:
        """What was taken is used up."""
        self._release(owner, kept)

    def forget(self, owner: Owner) -> None:
        """Let all passes of one session go."""
        for key in [key for key in self._passes if key[0] is owner]:
            self._drop(key)
        self._taken.pop(owner, None)

    def spare_turn(self) -> Turn | None:
        """One block more of a pass that a session goes back through next."""
        following = self._following()
        for number, key in enumerate(following):
            kept = self._passes[key]
            size = kept.forward.ahead
            if size and self._has_room(size, following[: number + 1]):
                kept.ahead += size
                self.ahead += size
                return self._ahead_turn(key, kept)
        return None

    def _following(self) -> list[Key]:
        """The next pass of each session, those first that were here last: its first after the one
        that it took last, or else its first."""
        first: dict[Owner, int] = {}
        for owner, number in self._passes:
            taken = self._taken[owner]
            if owner not in first or first[owner] <= taken < number:
                first[owner] = number
        return [(owner, first[owner]) for owner in reversed(self._taken) if owner in first]

    def _has_room(self, size: int, keys: Sequence[Key]) -> bool:
        """Whether there is room for more activations, or was made: those of other passes than
        ``keys`` go for it."""
        others = [kept for key, kept in self._passes.items() if kept.ahead and key not in keys]
        if self.ahead - sum(kept.ahead for kept in others) + size > self.ahead_size:
            return False
        while self.ahead + size > self.ahead_size:
            kept = others.pop()
            kept.forward.let_go()
            self.ahead -= kept.ahead
            kept.ahead = 0
        return True

    def _ahead_turn(self, key: Key, kept: Kept) -> Turn:
        def failed(_: Exception) -> None:
            if self._passes.get(key) is kept:
                self._drop(key)

        load = Load(1, kept.job.tokens)
        return Turn("activations", kept.forward.restore, load, lambda _: None, failed)

    def _drop(self, key: Key) -> None:
        kept = self._passes.pop(key, None)
        if kept is not None:
            self._release(key[0], kept)

    def _release(self, owner: Owner, kept: Kept) -> None:
        self._charge(owner, -kept.nbytes)
        self.ahead -= kept.ahead

    def _charge(self, owner: Owner, nbytes: int) -> None:
        self._bytes[owner.client] += nbytes
        if not self._bytes[owner.client]:
            del self._bytes[owner.client]
