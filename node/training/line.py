"""The client's side of training through one hop: jobs go out, results come back, silence is judged.

Jobs are sent by a task of their own, so that a caller who is cancelled cuts no message in two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trio

from petalnode.errors import PeerError, PeerGone, PeerRefused
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import MAX_ITEM_BYTES, MAX_SEQ, BadMessage, whole
from petalnode.session.line import (
    OPEN_HOP_DEADLINE_S,
    check_opened,
    misbehaved,
    silent,
    stuck,
    words,
)
from petalnode.tensor_frames import TensorCollector, pack_tensors
from petalnode.training.protocol import (
    ANSWERS,
    MAX_FRAME_BYTES,
    MAX_MICRO_TOKENS,
    TRAIN_PROTOCOL,
    Job,
    Kind,
    OpenTraining,
)
from petalnode.training.spread import Stage
from petalnode.tuning_wire import pack

SILENCE_S = 15.0
"""A hop that has a job and says nothing for so long is given up: it says that it lives more often,
but a frame may take its time on a slow link."""
STUCK_S = 300.0
"""So is one that lives and computes nothing for anybody: no step of one block takes so long."""
LOOK_S = 1.0
WITHOUT_TUNING = frozenset({"tuning", "busy", "version"})
"""Refusals of a hop that does not have the tuning which a job needs."""
MAX_TUNING = 1 << 40

Tensors = Mapping[str, torch.Tensor]


class Opener(Protocol):
    """The part of the host that is needed here."""

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A new stream to ``peer_id``."""


@dataclass(frozen=True)
class Added:
    """What is added to the blocks, under the number of its version; 0 is nothing."""

    version: int = 0
    tuning: Tuning = NOTHING


@dataclass(eq=False)
class _Asked:
    """A job on its way, and what came of it."""

    job: Job
    inputs: Tensors
    added: Added
    collector: TensorCollector
    sent_at: float | None = None
    error: PeerError | None = None
    answered: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True)
class Answer:
    """What came of a job, for how many seconds it kept the hop and the link busy, and its id."""

    tensors: dict[str, torch.Tensor]
    busy_s: float
    job: int


class TrainLine:
    """One hop, as the client holds it. ``lost``: why it can be used no more; ``leaving``: it asked
    for no more jobs. Made by ``open_train_line``; ``run`` is its task."""

    def __init__(
        self, opened: OpenTraining, stream: FrameStream, max_tokens: int, max_tuning: int
    ) -> None:
        self.peer_id, self.start, self.end = stream.peer_id, opened.start, opened.end
        self.lost: PeerError | None = None
        self.leaving = False
        self._stream, self._max_tokens, self._max_tuning = stream, max_tokens, max_tuning
        self._asked: dict[int, _Asked] = {}
        self._queue: deque[_Asked] = deque()
        self._queued = trio.Event()
        self._version = 0
        self._count = 0
        self._done = 0
        self._heard_at = self._advanced_at = self.answered_at = trio.current_time()

    async def run(self) -> None:
        """Send and read until the line is lost."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._watch)
            await self._read()
            nursery.cancel_scope.cancel()

    async def ask(
        self,
        kind: Kind,
        stage: Stage,
        lengths: tuple[int, ...],
        inputs: Tensors,
        added: Added,
        *,
        keep: bool = False,
        of: int = 0,
    ) -> Answer:
        """Send a job and wait for what comes of it; ``keep`` and ``of`` are those of ``Job``.

        Raises ``PeerError``: the hop refused the job (``PeerRefused``) or is lost.
        """
        if self.lost is not None:
            raise self.lost
        self._count += 1
        job = Job(kind, self._count, *stage, lengths, added.version, keep, of)
        self._check(job, added.tuning)
        sent = {name: inputs[name] for name in job.inputs}
        asked = _Asked(job, sent, added, answer_collector(sent, added.tuning.within(*stage)))
        self._asked[job.id] = asked
        self._queue.append(asked)
        self._queued.set()
        try:
            await asked.answered.wait()
        finally:
            self._asked.pop(job.id, None)
            self._leave_if_idle()
        if asked.error is not None:
            raise asked.error
        assert asked.sent_at is not None
        busy_s = trio.current_time() - max(asked.sent_at, self.answered_at)
        self.answered_at = trio.current_time()
        return Answer(asked.collector.tensors, busy_s, job.id)

    def lose(self, error: PeerError) -> None:
        """Give the hop up; whoever waits is told. The first reason stays."""
        self.lost = self.lost or error
        self._stream.reset()
        for asked in self._asked.values():
            if not asked.answered.is_set():
                asked.error = self.lost
                asked.answered.set()

    def _leave_if_idle(self) -> None:
        """A hop that wants to leave waits for us: let it go as soon as it owes nothing."""
        if self.leaving and not self._asked:
            self.lose(PeerRefused(f"Peer {self.peer_id} leaves.", "", self.peer_id, "draining"))

    def _check(self, job: Job, tuning: Tuning) -> None:
        if job.tokens > self._max_tokens:
            why = f"it takes {self._max_tokens} tokens a job, and a row has more"
            raise PeerRefused(f"Peer {self.peer_id}: {why}.", "", self.peer_id, "tokens")
        size = tuning.within(self.start, self.end).nbytes
        if size > self._max_tuning:
            why = f"an adapter of {size} bytes for its blocks is over its limit, {self._max_tuning}"
            raise PeerRefused(f"Peer {self.peer_id}: {why}.", "", self.peer_id, "tuning")

    async def _send(self) -> None:
        try:
            while True:
                while not self._queue:
                    self._queued = trio.Event()
                    await self._queued.wait()
                asked = self._queue.popleft()
                if asked.job.id in self._asked:  # its caller still waits
                    await self._send_job(asked)
        except PeerError as error:
            self.lose(error)

    async def _send_job(self, asked: _Asked) -> None:
        added = asked.added
        if added.version not in (0, self._version):
            part = added.tuning.within(self.start, self.end)
            for header, tensors in pack(part, MAX_FRAME_BYTES, added.version):
                await self._stream.send(header, tensors)
            self._version = added.version
        asked.sent_at = trio.current_time()
        message = pack_tensors(asked.job.to_wire(), asked.inputs.items(), MAX_FRAME_BYTES)
        for header, tensors in message:
            await self._stream.send(header, tensors)

    async def _watch(self) -> None:
        """Give the hop up if it owes an answer and is silent, or gets nowhere."""
        while True:
            await trio.sleep(LOOK_S)
            now = trio.current_time()
            sent = [a.sent_at for a in self._asked.values() if a.sent_at is not None]
            if not sent:
                continue
            if now - max(self._heard_at, min(sent)) > SILENCE_S:
                self.lose(silent(self.peer_id, SILENCE_S))
            elif now - max(self._advanced_at, min(sent)) > STUCK_S:
                self.lose(stuck(self.peer_id, STUCK_S))

    async def _read(self) -> None:
        """What the hop says, to its end. Failures are kept, never raised."""
        try:
            while (frame := await self._stream.receive()) is not None:
                self._heard_at = trio.current_time()
                self._take(frame)
            gone = PeerGone(f"Peer {self.peer_id} closed the session.", peer_id=self.peer_id)
            self.lose(gone)
        except PeerError as error:
            self.lose(error)
        except BadMessage as bad:
            self.lose(misbehaved(self.peer_id, str(bad)))

    def _take(self, frame: Frame) -> None:
        kind = frame.header.get("type")
        if kind == "alive":
            done = whole(frame.header.get("done"), 0, MAX_SEQ)
            if done != self._done:
                self._done, self._advanced_at = done, trio.current_time()
        elif kind == "draining":
            self.leaving = True
            self._leave_if_idle()
        elif kind == "error" or kind in ANSWERS.values():
            asked = self._asked.get(whole(frame.header.get("id"), 1, MAX_SEQ))
            if asked is not None:  # else its caller left
                self._take_answer(asked, frame)
        else:
            raise BadMessage("a message of unknown type")

    def _take_answer(self, asked: _Asked, frame: Frame) -> None:
        kind = frame.header.get("type")
        if kind == "error":
            why, code = words(frame.header, "why"), words(frame.header, "code")
            asked.error = PeerRefused(f"Peer {self.peer_id}: {why}.", "", self.peer_id, code)
            if code in WITHOUT_TUNING and asked.added.version == self._version:
                self._version = 0  # whoever asks again brings it along
        elif kind != ANSWERS[asked.job.kind]:
            raise BadMessage("an answer to another question")
        elif not asked.collector.add(frame):
            return
        self._advanced_at = trio.current_time()
        asked.answered.set()


def answer_collector(inputs: Tensors, tuning: Tuning) -> TensorCollector:
    """For what may come back: a tensor like x, and a gradient for each matrix."""
    named = dict(tuning.named())
    numbers = next(iter(inputs.values())).numel() + sum(tensor.numel() for tensor in named.values())
    return TensorCollector(numbers * MAX_ITEM_BYTES, 1 + len(named))


async def open_train_line(opener: Opener, peer_id: str, opened: OpenTraining) -> TrainLine:
    """Ask a hop to train through some of its blocks. Raises ``PeerError`` that names it."""
    stream: FrameStream | None = None
    try:
        with trio.fail_after(OPEN_HOP_DEADLINE_S):
            stream = await opener.open_stream(peer_id, TRAIN_PROTOCOL)
            stream.max_payload = MAX_FRAME_BYTES
            await stream.send(opened.to_wire())
            answer = await stream.receive()
        check_opened(peer_id, answer)
        assert answer is not None
        max_tokens = whole(answer.header.get("max_tokens"), 1, MAX_MICRO_TOKENS)
        max_tuning = whole(answer.header.get("max_tuning"), 0, MAX_TUNING)
    except BaseException as error:
        if stream is not None:
            stream.reset()
        if isinstance(error, trio.TooSlowError):
            what = f"Peer {peer_id} did not open a session in {OPEN_HOP_DEADLINE_S:.0f} s."
            raise PeerGone(what, peer_id=peer_id) from None
        if isinstance(error, BadMessage):
            raise misbehaved(peer_id, str(error)) from None
        raise
    return TrainLine(opened, stream, max_tokens, max_tuning)
