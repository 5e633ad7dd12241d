"""One client's training through this node's blocks: jobs come, results go, nothing is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import trio

from petalnode.compute import Compute, Load
from petalnode.errors import LocalProtocolError, UsageError
from petalnode.models.span import Span
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.check import check_tuning
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.nurseries import plain_errors
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import MAX_ITEM_BYTES, MAX_SEQ, BadMessage, whole
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.rows import Refusal
from petalnode.serving.session_tuning import MAX_SESSION_TUNING_BYTES
from petalnode.tensor_frames import TensorCollector, pack_tensors
from petalnode.training.protocol import (
    ANSWERS,
    INPUTS,
    KINDS,
    MAX_FRAME_BYTES,
    MAX_QUEUED,
    Job,
    OpenTraining,
    job_error_wire,
)
from petalnode.tuning_wire import Collector

ALIVE_S = 2.0

Tensors = Mapping[str, torch.Tensor]


class Room:
    """Bytes that may be held at once; who wants more than there is waits."""

    def __init__(self, size: int) -> None:
        self.used = 0
        self._size = size
        self._given = trio.Event()

    async def take(self, size: int) -> None:
        """Wait for room. Whatever the size, who is alone gets it."""
        while self.used and self.used + size > self._size:
            await self._given.wait()
        self.used += size

    def give(self, size: int) -> None:
        """Let others have it."""
        self.used -= size
        given, self._given = self._given, trio.Event()
        given.set()


class TrainSession:
    """Blocks ``[start, end)`` for one client's training. Made by ``TrainServer``."""

    def __init__(
        self,
        opened: OpenTraining,
        stream: FrameStream,
        engine: SpanEngine,
        compute: Compute,
        *,
        max_tokens: int,
        tunings: KvBudget,
        room: Room,
    ) -> None:
        self.client = stream.peer_id
        self._opened, self._stream, self._max_tokens = opened, stream, max_tokens
        self._engine, self._compute, self._room = engine, compute, room
        self._config = engine.span.config
        self._tuning = _Held(opened, tunings)
        self._slots = trio.Semaphore(MAX_QUEUED)
        self._jobs = 0
        self._held = 0
        self._idle = trio.Event()
        self._answering = trio.Lock()
        self._draining = False

    async def serve(self) -> None:
        """Read the stream to its end, then forget everything."""
        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_client, nursery.cancel_scope)
                    nursery.start_soon(self._say_alive)
                    await self._read(nursery)
                    nursery.cancel_scope.cancel()
        finally:
            self._stream.reset()
            self._tuning.forget()
            self._room.give(self._held)

    async def say_draining(self) -> None:
        """Tell the client that this node is about to leave."""
        self._draining = True
        await self._stream.send({"type": "draining"})

    async def _watch_client(self, scope: trio.CancelScope) -> None:
        """A client that left ends everything at once, whatever waits unread."""
        await self._stream.wait_broken()
        scope.cancel()

    async def _say_alive(self) -> None:
        while True:
            await trio.sleep(ALIVE_S)
            done = self._engine.tokens + self._engine.training_steps
            await self._stream.send({"type": "alive", "done": done})

    async def _read(self, nursery: trio.Nursery) -> None:
        while True:
            await self._slots.acquire()
            frame = await self._stream.receive()
            if frame is None:
                return
            kind = frame.header.get("type")
            if kind == "tuning":
                await self._take_tuning(frame)
                self._slots.release()
            elif kind in KINDS:
                await self._take_job(frame, nursery)
            else:
                raise BadMessage("a message of unknown type")

    async def _rest(self, frame: Frame) -> Frame:
        """The frame that goes on with that one's message."""
        after = await self._stream.receive()
        if after is None or after.header.get("type") != frame.header.get("type"):
            raise BadMessage("a message that breaks off")
        return after

    async def _take_tuning(self, frame: Frame) -> None:
        """Put another tuning in the place of what there is, once no job needs that any more."""
        version = whole(frame.header.get("version"), 1, MAX_SEQ)
        while self._jobs:
            await self._idle.wait()
        self._tuning.begin(version, self._config)
        while not self._tuning.take(frame):
            frame = await self._rest(frame)
        try:
            self._tuning.tuning = await self._compute.run(self._placed_tuning)
        except UsageError as wrong:
            self._tuning.refuse(Refusal("tuning", wrong.cause.rstrip(".")))

    def _placed_tuning(self) -> Tuning:
        """What came, checked, on the span's device. Runs in the worker thread."""
        tuning = self._tuning.tuning
        check_tuning(self._config, self._opened.start, self._opened.end, tuning)
        return tuning.map(lambda tensor: tensor.to(self._engine.span.device))

    async def _take_job(self, frame: Frame, nursery: trio.Nursery) -> None:
        job = Job.parse(frame.header, self._opened, self._max_tokens, self._config.max_positions)
        shape = (job.tokens, self._config.hidden_size)
        names = INPUTS[job.kind]
        size = len(names) * shape[0] * shape[1] * MAX_ITEM_BYTES
        await self._room.take(size)
        self._held += size
        collector = TensorCollector(size, len(names))
        while not collector.add(frame):
            frame = await self._rest(frame)
        if any(tuple(tensor.shape) != shape for tensor in collector.tensors.values()):
            raise BadMessage(f"the tensors of a job are not of shape {shape}")
        if set(collector.tensors) != set(names):
            raise BadMessage(f"the tensors of a {job.kind} are not {' and '.join(names)}")
        self._jobs += 1
        nursery.start_soon(self._run, job, collector.tensors, size)

    async def _run(self, job: Job, inputs: Tensors, size: int) -> None:
        """Compute one job and answer it."""
        try:
            outputs = await self._computed(job, inputs)
        except (Refusal, LocalProtocolError) as problem:
            code = problem.code if isinstance(problem, Refusal) else "internal"
            await self._stream.send(job_error_wire(job.id, code, str(problem)))
        else:
            answer = {"type": ANSWERS[job.kind], "id": job.id}
            async with self._answering:
                for header, tensors in pack_tensors(answer, outputs.items(), MAX_FRAME_BYTES):
                    await self._stream.send(header, tensors)
        self._jobs -= 1
        self._held -= size
        self._room.give(size)
        self._slots.release()
        if not self._jobs:
            idle, self._idle = self._idle, trio.Event()
            idle.set()

    async def _computed(self, job: Job, inputs: Tensors) -> Tensors:
        """What the client gets. Raises ``Refusal``, or ``LocalProtocolError`` if it fails."""
        if self._draining:
            raise Refusal("draining", "this node is about to leave")
        tuning = self._tuning.of(job)
        await self._compute.run(lambda: check_finite(job, inputs))
        if job.kind == "forward":
            load = Load(1, job.tokens)
            forward = await self._engine.train(lambda s: forward_pass(s, job, inputs, tuning), load)
            assert isinstance(forward, ForwardPass)
            results = {"x": forward.output}
        else:
            load = Load(1, job.tokens + job.tokens // 2)  # once more forward, twice as much back
            back = await self._engine.train(lambda s: backward_pass(s, job, inputs, tuning), load)
            assert isinstance(back, BackwardPass)
            results = {"x": back.grad, **back.tuning_grads}
        return await self._compute.run(lambda: checked_results(job, results))


class _Held:
    """The tuning that a session added, and what it is charged."""

    def __init__(self, opened: OpenTraining, budget: KvBudget) -> None:
        self.tuning: Tuning = NOTHING
        self._opened, self._budget = opened, budget
        self._version = 0
        self._bytes = 0
        self._refusal: Refusal | None = None
        self._collector: Collector | None = None

    def begin(self, version: int, config: Any) -> None:
        """Forget what there is; frames of another come now."""
        self.forget()
        start, end = self._opened.start, self._opened.end
        self._version, self._refusal = version, None
        self._collector = Collector(config, start, end, MAX_SESSION_TUNING_BYTES)

    def take(self, frame: Frame) -> bool:
        """Take a frame; whether it was the last one. Raises ``BadMessage``."""
        wanted = self._bytes + sum(tensor.nbytes for tensor in frame.tensors)
        if self._refusal is None and not self._budget.resize(self._bytes, wanted):
            self.refuse(Refusal("busy", "there is no room for another adapter"))
        if self._refusal is not None:
            return frame.header.get("last") is True
        assert self._collector is not None
        self._bytes = wanted
        taken = self._collector.take(frame)
        if taken is None:
            return False
        self.tuning, self._collector = taken, None
        return True

    def refuse(self, refusal: Refusal) -> None:
        """It cannot be kept: jobs that need it are told."""
        self.forget()
        self._refusal = refusal

    def of(self, job: Job) -> Tuning:
        """What a job needs. Raises ``Refusal`` where that was not taken, ``BadMessage``."""
        if job.version == 0:
            return NOTHING
        if job.version != self._version:
            raise Refusal("version", f"no tuning {job.version} came here")
        if self._refusal is not None:
            raise self._refusal
        return self.tuning.within(job.start, job.end)

    def forget(self) -> None:
        """Free everything."""
        self.tuning, self._collector = NOTHING, None
        self._budget.resize(self._bytes, 0)
        self._bytes = 0


def forward_pass(span: Span, job: Job, inputs: Tensors, tuning: Tuning) -> ForwardPass:
    """The job as steps. Runs in the worker thread."""
    return ForwardPass(span, job.start, job.end, inputs["x"], job.lengths, tuning)


def backward_pass(span: Span, job: Job, inputs: Tensors, tuning: Tuning) -> BackwardPass:
    """The job as steps. Runs in the worker thread."""
    x, grad = inputs["x"], inputs["g"]
    return BackwardPass(span, job.start, job.end, x, job.lengths, tuning, grad)


def check_finite(job: Job, inputs: Tensors) -> None:
    """Raise ``Refusal`` that names what is NaN or infinite."""
    names = {"x": "the hidden states", "g": "the gradient"}
    for name, tensor in inputs.items():
        if not bool(tensor.isfinite().all()):
            what = f"{names[name]} for blocks {job.start}:{job.end}"
            raise Refusal("numbers", f"{what} hold numbers that are not finite")


def checked_results(job: Job, results: Tensors) -> Tensors:
    """They, on the CPU. Raises ``Refusal`` where the computation left what numbers can hold."""
    for tensor in results.values():
        if not bool(tensor.isfinite().all()):
            went = "forward" if job.kind == "forward" else "backward"
            why = f"{went} through blocks {job.start}:{job.end} the numbers become infinite or NaN"
            raise Refusal("numbers", why)
    return {name: tensor.detach().cpu() for name, tensor in results.items()}
