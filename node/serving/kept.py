"""Forward passes whose backward may come: what a node keeps of them, and for how long.

They save the way back a second forward pass. Nothing is owed to anybody: where there is no room,
the oldest pass of the peer that keeps most goes, and its client sends the input once more.

While the node has nothing else to do, it computes activations of these passes again, ahead of the
gradient: a hop waits for those behind it, and so the client does not wait for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass(eq=False)
class Kept:
    """The pass that a job made, and what is charged for it, and for activations ahead."""

    owner: Owner
    job: Job
    forward: ForwardPass
    nbytes: int
    age: int
    """How many were kept before it."""
    activations: int = 0
    failed: bool = False
    """To compute activations; it is not tried again."""


@dataclass
class _Session:
    passes: dict[int, Kept] = field(default_factory=dict)
    taken: int = 0
    """The job whose pass was taken last."""

    @property
    def following(self) -> Kept | None:
        """What it goes back through next: its first pass after the last that was taken; else its
        first."""
        later = (kept for number, kept in self.passes.items() if number > self.taken)
        return next(later, None) or next(iter(self.passes.values()), None)


class KeptPasses:
    """The passes of all sessions of a node, ``size`` bytes at most, by session and job, and up to
    ``ahead_size`` bytes of activations that they will need.

    One that was taken counts until it is given back: it is in memory as long as somebody uses it.
    """

    def __init__(self, size: int = MAX_KEPT_BYTES, ahead_size: int = MAX_AHEAD_BYTES) -> None:
        self.size, self.ahead_size = size, ahead_size
        self._sessions: dict[Owner, _Session] = {}
        """Those last that were here last."""
        self._bytes: Counter[str] = Counter()
        self._ahead: Counter[str] = Counter()
        self._ready: dict[Kept, None] = {}
        """Those that have activations, and were not taken."""
        self._made = 0

    @property
    def used(self) -> int:
        """Bytes, without activations."""
        return self._bytes.total()

    @property
    def ahead(self) -> int:
        """Bytes of activations."""
        return self._ahead.total()

    def put(self, owner: Owner, job: Job, forward: ForwardPass, nbytes: int) -> None:
        """Keep a pass, and let others go for it where they must.

        It is not kept where its peer would have most, and has nothing older to let go.
        """
        if (before := self._of(owner).get(job.id)) is not None:
            self._drop(before)
        if nbytes > self.size:
            return
        charge(self._bytes, owner, nbytes)
        while self.used > self.size:
            oldest = self._oldest(max(self._bytes, key=self._bytes.__getitem__))
            if oldest is None:
                charge(self._bytes, owner, -nbytes)
                return
            self._drop(oldest)
        self._made += 1
        session = self._seen(owner)
        session.passes[job.id] = Kept(owner, job, forward, nbytes, self._made)

    def take(self, owner: Owner, back: Job) -> Kept | None:
        """What a backward job goes back through, if it is here; nobody else gets it then. Whoever
        took it gives it back."""
        kept = self._of(owner).get(back.of)
        if kept is None:
            return None
        there = kept.job
        same = (there.start, there.end, there.lengths, there.version)
        if same != (back.start, back.end, back.lengths, back.version):
            return None
        session = self._seen(owner)
        session.taken = back.of
        self._ready.pop(kept, None)
        return session.passes.pop(back.of)

    def give_back(self, kept: Kept) -> None:
        """What was taken is used up."""
        charge(self._bytes, kept.owner, -kept.nbytes)
        self._release(kept, kept.activations)

    def forget(self, owner: Owner) -> None:
        """Let all passes of one session go."""
        for kept in list(self._of(owner).values()):
            self._drop(kept)
        self._sessions.pop(owner, None)

    def spare_turn(self) -> Turn | None:
        """One block's activations, for a pass that a session goes back through next."""
        for kept in self._following():
            size = 0 if kept.failed else kept.forward.next_activations
            if size and self._has_room(kept.owner, size):
                kept.activations += size
                self._ready[kept] = None
                charge(self._ahead, kept.owner, size)
                return self._turn(kept, size)
        return None

    def _turn(self, kept: Kept, size: int) -> Turn:
        def failed(_: Exception) -> None:
            kept.failed = True
            self._release(kept, min(size, kept.activations))

        load = Load(1, kept.job.tokens)
        return Turn("activations", kept.forward.restore, load, lambda _: None, failed)

    def _following(self) -> Iterator[Kept]:
        """The next pass of each session, of those first that were here last."""
        for session in reversed(self._sessions.values()):
            if (kept := session.following) is not None:
                yield kept

    def _has_room(self, owner: Owner, size: int) -> bool:
        """Whether there is room for a session's activations, or was made."""
        while self.ahead + size > self.ahead_size:
            dearest = self._dearest(owner, size)
            if dearest is None:
                return False
            # No turn is computed now: it could be that of these activations.
            self._release(dearest, dearest.forward.let_go() or dearest.activations)
        return True

    def _dearest(self, owner: Owner, size: int) -> Kept | None:
        """Who lets go of a block's activations: a pass that nobody needs next, or the peer that has
        most. It would still have more than the other then, which could not take them back."""
        following = set(self._following())
        for kept in self._ready:
            if kept not in following:
                return kept
        most = max(self._ahead, key=self._ahead.__getitem__, default="")
        if self._ahead[most] < self._ahead[owner.client] + 2 * size:
            return None
        return next((kept for kept in self._ready if kept.owner.client == most), None)

    def _release(self, kept: Kept, size: int) -> None:
        """So many bytes of a pass's activations are no more, or in nobody's way."""
        charge(self._ahead, kept.owner, -size)
        kept.activations -= size
        if not kept.activations:
            self._ready.pop(kept, None)

    def _seen(self, owner: Owner) -> _Session:
        """The session, which was here last now."""
        session = self._sessions.pop(owner, _Session())
        self._sessions[owner] = session
        return session

    def _of(self, owner: Owner) -> dict[int, Kept]:
        session = self._sessions.get(owner)
        return {} if session is None else session.passes

    def _oldest(self, client: str) -> Kept | None:
        sessions = [one for owner, one in self._sessions.items() if owner.client == client]
        oldest = (next(iter(one.passes.values())) for one in sessions if one.passes)
        return min(oldest, key=lambda kept: kept.age, default=None)

    def _drop(self, kept: Kept) -> None:
        del self._sessions[kept.owner].passes[kept.job.id]
        self.give_back(kept)


def charge(account: Counter[str], owner: Owner, nbytes: int) -> None:
    """Count bytes for the owner's peer."""
    account[owner.client] += nbytes
    if not account[owner.client]:
        del account[owner.client]
