"""Forward passes whose backward may come: what a node keeps of them, and for how long.

They save the way back a second forward pass. Nothing is owed to anybody: where there is no room,
the oldest pass of the peer that keeps most goes, and its client sends the input once more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from petalnode.models.training import ForwardPass
from petalnode.training.protocol import Job

MAX_KEPT_BYTES = 1 << 30
"""Of all sessions together."""


class Owner(Protocol):
    """A session; all of one peer's share what is kept for that peer."""

    client: str


@dataclass(frozen=True, eq=False)
class Kept:
    """A pass, the job that it was made by, and what is charged for it."""

    job: Job
    forward: ForwardPass
    nbytes: int


class KeptPasses:
    """The passes of all sessions of a node, ``size`` bytes at most, by session and job.

    One that was taken counts until it is given back: it is in memory as long as somebody uses it.
    """

    def __init__(self, size: int = MAX_KEPT_BYTES) -> None:
        self.size = size
        self._passes: dict[tuple[Owner, int], Kept] = {}
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
        return self._passes.pop((owner, back.of))

    def give_back(self, owner: Owner, kept: Kept) -> None:
        """What was taken is used up."""
        self._charge(owner, -kept.nbytes)

    def forget(self, owner: Owner) -> None:
        """Let all passes of one session go."""
        for key in [key for key in self._passes if key[0] is owner]:
            self._drop(key)

    def _drop(self, key: tuple[Owner, int]) -> None:
        kept = self._passes.pop(key, None)
        if kept is not None:
            self._charge(key[0], -kept.nbytes)

    def _charge(self, owner: Owner, nbytes: int) -> None:
        self._bytes[owner.client] += nbytes
        if not self._bytes[owner.client]:
            del self._bytes[owner.client]
