"""The hops of a training session: whom to give which work, and what to do when one fails.

Every piece of work, a micro-batch through one stage, is given to the peer through which it ends
soonest (`petalnode.training.spread`); one that fails, refuses or leaves is passed over, and the
work goes to another. Hops are asked for a session when they are first needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import trio

from petalnode.errors import NoRoute, PeerError, PeerRefused, UsageError
from petalnode.events import HopLost, Report, Waiting
from petalnode.models.finite import is_finite
from petalnode.routing.speeds import SpeedLedger
from petalnode.session.line import misbehaved
from petalnode.training.line import Added, Tensors, TrainLine
from petalnode.training.peers import Peers
from petalnode.training.protocol import MAX_QUEUED, Kind
from petalnode.training.spread import Choice, Offer, Stage, replicas, soonest

WAIT_S = 100.0
"""How long work waits for somebody who takes it, as in a generation."""
LOOK_AGAIN_S = 1.0
AVOID_S = 5.0
"""A peer that refused or failed is not asked again for so long."""
FORGOTTEN = "forgotten"
"""A hop's refusal to go back a way that it did not keep: it is sent the input then."""
FINAL = frozenset({"protocol", "model", "tuning", "tokens", "numbers", "version"})
"""Refusals that waiting does not mend."""
BACKWARD_COST = 2.0
"""A backward pass in forward passes: one again, and as many products back."""


class Call(Protocol):
    """What all micro-batches of one forward or backward have in common."""

    added: Added
    tokens: int
    stages: set[Stage]
    """Stages that forward work goes through; more come where these have no replica left."""
    refused: dict[str, PeerRefused]
    """By whom this is not taken, for reasons that waiting does not mend."""


@dataclass(eq=False)
class Held:
    """A hop that may have kept what a backward pass through its forward ``job`` needs."""

    line: TrainLine
    job: int

    def job_of(self, line: TrainLine) -> int:
        """The job's id if that is the hop, else 0; once, because the hop uses it up."""
        job = self.job if line is self.line else 0
        self.job = 0
        return job


@dataclass(frozen=True, eq=False)
class Work:
    """A micro-batch of rows with these ``lengths``: forward through the first stage of ``span``, or
    backward through all of it at once. ``keep``: it goes back later; ``held``: by whom it was kept.
    """

    kind: Kind
    span: Stage
    lengths: tuple[int, ...]
    inputs: Tensors
    call: Call
    keep: bool = False
    held: Held | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def whole(self) -> bool:
        """Whether it goes through the span at once."""
        return self.kind == "backward"


@dataclass(frozen=True, eq=False)
class Done:
    """What came of work: tensors, the block after the last one it went through, who kept it."""

    tensors: dict[str, torch.Tensor]
    end: int
    held: Held


class _Patience:
    """How long work that nobody takes still waits, from the first time on that this is asked."""

    def __init__(self) -> None:
        self.told = ""
        self._until: float | None = None

    def left(self) -> float:
        """Seconds."""
        now = trio.current_time()
        self._until = now + WAIT_S if self._until is None else self._until
        return self._until - now


class NobodyHoldsAll(Exception):
    """No peer holds all blocks of work that goes through them at once."""


class Crew:
    """See the module. ``open_line`` opens a session with a peer for its part of ``span``; lines run
    in ``nursery``."""

    def __init__(
        self,
        peers: Peers,
        span: Stage,
        open_line: Callable[[Offer], Awaitable[TrainLine]],
        nursery: trio.Nursery,
        report: Report,
    ) -> None:
        self._peers, self._open_line, self._report = peers, open_line, report
        self._nursery, self._span = nursery, span
        self._lines: dict[str, TrainLine] = {}
        self._opening: dict[str, trio.Lock] = {}
        self._busy_s: dict[str, float] = {}
        self._jobs: Counter[str] = Counter()
        self._speeds = {"forward": SpeedLedger(), "backward": SpeedLedger()}
        self._avoided: dict[str, tuple[float, PeerError]] = {}
        self._changed = trio.Event()
        self._closed = False

    @property
    def lines(self) -> Sequence[TrainLine]:
        """The hops that are open."""
        return [line for line in self._lines.values() if line.lost is None]

    def plan(self, span: Stage, tokens: int) -> set[Stage]:
        """Stages for a batch of so many tokens, as far as there are peers now."""
        try:
            return self._peers.stages(span, tokens, self._avoided)
        except NoRoute:
            return set()  # who works through them will wait, and say why

    def is_alone(self, stages: set[Stage]) -> bool:
        """Whether these stages are all of the span at once, and one peer alone holds it."""
        return stages == {self._span} and len(replicas(self._peers.offers(), self._span)) == 1

    async def do(self, work: Work) -> Done:
        """Have it done.

        Waits for peers, with a reason. Raises ``NoRoute`` if nobody takes it, ``UsageError`` for
        numbers that the blocks cannot compute with, ``NobodyHoldsAll``.
        """
        patience, held = _Patience(), work.held
        while True:
            choice = await self._choose(work, held, patience)
            try:
                return await self._give(work, choice, held)
            except PeerError as error:
                if held is None or code_of(error) != FORGOTTEN:
                    self._failed(choice.offer.peer_id, error, work.call)
                if patience.left() <= 0:
                    raise
            held = None

    def close(self) -> None:
        """Let all hops forget us; who still waits for work is told."""
        self._closed = True
        self._wake()
        for line in self._lines.values():
            line.lose(closed(line.peer_id))

    async def _give(self, work: Work, choice: Choice, held: Held | None) -> Done:
        offer, stage = choice.offer, (work.span[0], choice.end)
        cost_s = offer.seconds(stage, work.tokens)
        self._busy_s[offer.peer_id] = self._busy_s.get(offer.peer_id, 0.0) + cost_s
        self._jobs[offer.peer_id] += 1
        try:
            line = await self._line(offer)
            of = 0 if held is None else held.job_of(line)
            answer = await line.ask(
                work.kind,
                stage,
                work.lengths,
                work.inputs,
                work.call.added,
                keep=work.keep,
                of=of,
            )
            check_answer(offer.peer_id, work, stage, answer.tensors)
        finally:
            self._jobs[offer.peer_id] -= 1
            self._busy_s[offer.peer_id] -= cost_s
            self._wake()
        self._measure(offer.peer_id, work, stage, answer.busy_s)
        return Done(answer.tensors, choice.end, Held(line, answer.job))

    def _measure(self, peer_id: str, work: Work, stage: Stage, busy_s: float) -> None:
        each_s = busy_s / work.tokens
        blocks, now = stage[1] - stage[0], trio.current_time()
        self._speeds[work.kind].observe(peer_id, each_s / blocks, now)
        self._peers.worked(peer_id, blocks, each_s, work.kind)

    async def _line(self, offer: Offer) -> TrainLine:
        async with self._opening.setdefault(offer.peer_id, trio.Lock()):
            self._check_open()
            line = self._lines.get(offer.peer_id)
            if line is None or line.lost is not None or not self._covers(line, offer):
                if offer.peer_id in self._avoided:  # it failed others who waited here before
                    raise self._avoided[offer.peer_id][1]
                line = await self._open_line(offer)
                if self._closed:  # meanwhile: nobody would run it
                    line.lose(closed(offer.peer_id))
                self._check_open()
                self._lines[offer.peer_id] = line
                self._nursery.start_soon(self._run, line)
            return line

    async def _run(self, line: TrainLine) -> None:
        """A hop, until it is lost; the user is told, unless that is how it should end."""
        await line.run()
        if line.lost is not None and code_of(line.lost) not in ("draining", "closed"):
            self._report(HopLost(line.peer_id, (line.start, line.end), line.lost.cause))

    async def _choose(self, work: Work, held: Held | None, patience: _Patience) -> Choice:
        """Who computes the next stage, once that peer has room for more."""
        while True:
            self._check_open()
            changed, offers = self._changed, self._offers(work)
            try:
                choice = self._holder(work, held, offers) or self._soonest(work, offers)
                choice = choice or self._replan(work, offers)
                if self._jobs[choice.offer.peer_id] < MAX_QUEUED:
                    return choice
            except NoRoute as none:
                left, final = patience.left(), self._final(work)
                if final is not None or left <= 0:
                    raise final or none from None
                if none.cause != patience.told:
                    patience.told = none.cause
                    self._report(Waiting(none.cause, left))
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._news(changed)

    def _holder(self, work: Work, held: Held | None, offers: Sequence[Offer]) -> Choice | None:
        """Whoever kept the way back: nobody else has as little to do, or needs as little sent."""
        if held is None or held.line.lost is not None:
            return None
        there = (offer for offer in offers if self._lines.get(offer.peer_id) is held.line)
        return next((Choice(offer, work.span[1]) for offer in there), None)

    def _soonest(self, work: Work, offers: Sequence[Offer]) -> Choice | None:
        stages = {work.span} if work.whole else work.call.stages
        return soonest(offers, stages, self._busy_s, work.span, work.tokens)

    def _replan(self, work: Work, offers: Sequence[Offer]) -> Choice:
        """Other stages, where those that were planned have no replica left.

        Raises ``NoRoute`` or ``NobodyHoldsAll``.
        """
        if work.whole:
            raise NobodyHoldsAll
        work.call.stages |= self._peers.stages(work.span, work.call.tokens, self._avoid(work.call))
        choice = self._soonest(work, offers)
        if choice is None:  # a peer of that chain is lost, or leaves, and it is not known there yet
            raise NoRoute(f"Some of the blocks {work.span[0]} to {work.span[1] - 1} have nobody.")
        return choice

    def _offers(self, work: Work) -> list[Offer]:
        """Who may be asked, as fast as was measured here."""
        avoid = self._avoid(work.call)
        known = self._speeds[work.kind].block_s(trio.current_time())
        factor = BACKWARD_COST if work.whole else 1.0
        return [
            replace(offer, block_s=known.get(offer.peer_id, factor * offer.block_s))
            for offer in self._peers.offers()
            if offer.peer_id not in avoid and not self._is_leaving(offer.peer_id)
        ]

    def _avoid(self, call: Call) -> set[str]:
        """Who is not to be asked now."""
        now = trio.current_time()
        self._avoided = {p: entry for p, entry in self._avoided.items() if now < entry[0]}
        return {*self._avoided, *call.refused}

    def _final(self, work: Work) -> Exception | None:
        """What to raise where waiting mends nothing: all who hold some block refused for good."""
        offers, refused = self._peers.offers(), work.call.refused
        for block in range(*work.span):
            holders = [offer.peer_id for offer in replicas(offers, (block, block + 1))]
            if holders and all(peer_id in refused for peer_id in holders):
                return refusal_of(block, [refused[peer_id] for peer_id in holders])
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("The training session was closed.", "Open another.")

    def _covers(self, line: TrainLine, offer: Offer) -> bool:
        """Whether a line is open for all blocks of ours that its peer holds now."""
        start, end = max(offer.start, self._span[0]), min(offer.end, self._span[1])
        return line.start <= start and end <= line.end

    def _failed(self, peer_id: str, error: PeerError, call: Call) -> None:
        if isinstance(error, PeerRefused) and error.code in FINAL:
            call.refused[peer_id] = error
        else:
            self._avoided[peer_id] = trio.current_time() + AVOID_S, error
        self._peers.failed(error)
        self._wake()

    def _is_leaving(self, peer_id: str) -> bool:
        line = self._lines.get(peer_id)
        return line is not None and line.lost is None and line.leaving

    async def _news(self, changed: trio.Event) -> None:
        """Until something is different, here or in the swarm."""
        async with trio.open_nursery() as nursery:

            async def first(wait: Callable[[], Awaitable[None]]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(first, changed.wait)
            nursery.start_soon(first, self._peers.wait_changed)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


def refusal_of(block: int, errors: Sequence[PeerRefused]) -> Exception:
    """Why nobody takes work for a block."""
    last = errors[-1]
    if all(error.code == "numbers" for error in errors):
        return UsageError(
            f"Training left what numbers can hold: {last.cause}",
            "Lower the learning rate, and go on from the last checkpoint.",
        )
    return NoRoute(
        f"No replica of block {block} accepts this training: {last.cause}",
        "Ask for less (a lower rank, shorter rows), or start a node for these blocks.",
        (block,),
    )


def closed(peer_id: str) -> PeerRefused:
    """Why a line ends that we leave."""
    return PeerRefused("The session was closed.", "", peer_id, "closed")


def code_of(error: PeerError) -> str:
    """Why a peer refused, or nothing."""
    return error.code if isinstance(error, PeerRefused) else ""


def check_answer(peer_id: str, work: Work, stage: Stage, answer: Tensors) -> None:
    """Raise ``PeerMisbehaved`` unless the answer has what was asked for, in numbers."""
    shapes = {"x": work.inputs["x"].shape}
    if work.kind == "backward":
        part = work.call.added.tuning.within(*stage)
        shapes |= {name: tensor.shape for name, tensor in part.named()}
    if {name: tensor.shape for name, tensor in answer.items()} != shapes:
        raise misbehaved(peer_id, "its answer has not the tensors that were asked for")
    if not all(map(is_finite, answer.values())):
        raise misbehaved(peer_id, "its answer holds numbers that are not finite")
