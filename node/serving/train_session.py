"""One client's training through this node's blocks: jobs come, and results go."""

from __future__ import annotations

import trio

from petalnode.compute import Compute, Load
from petalnode.errors import LocalProtocolError, UsageError
from petalnode.models.memory import readable_bytes
from petalnode.models.training import ForwardPass
from petalnode.models.tuning.check import check_tuning
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.nurseries import plain_errors
from petalnode.p2p.frames import Frame, FrameStream
from petalnode.protocol import MAX_ITEM_BYTES, MAX_SEQ, BadMessage, whole
from petalnode.serving.engine import SpanEngine
from petalnode.serving.kept import KeptPasses
from petalnode.serving.rows import Refusal
from petalnode.serving.session_tuning import TuningBudget
from petalnode.serving.train_jobs import JobSteps, Tensors
from petalnode.tensor_frames import TensorCollector, TooLarge, pack_tensors
from petalnode.training.protocol import (
    ANSWERS,
    KINDS,
    MAX_FRAME_BYTES,
    MAX_QUEUED,
    Job,
    OpenTraining,
    job_error_wire,
)
from petalnode.tuning_wire import Collector

ALIVE_S = 2.0


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
        tunings: TuningBudget,
        kept: KeptPasses,
        room: Room,
    ) -> None:
        self.client = stream.peer_id
        self._opened, self._stream, self._max_tokens = opened, stream, max_tokens
        self._engine, self._compute, self._room = engine, compute, room
        self._config = engine.span.config
        self._kept = kept
        self._tuning = _Held(opened, self.client, tunings)
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
            self._kept.forget(self)
            self._engine.look()
            self._tuning.forget()
            self._room.give(self._held)

    async def say_draining(self) -> None:
        """Tell the client that this node is about to leave."""
        self._draining = True
        self._kept.forget(self)
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
        self._kept.forget(self)
        self._tuning.begin(version)
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
        # Copied: what came are views of whole frames, which these would keep in memory.
        return tuning.map(lambda tensor: tensor.to(self._engine.span.device, copy=True))

    async def _take_job(self, frame: Frame, nursery: trio.Nursery) -> None:
        job = Job.parse(frame.header, self._opened, self._max_tokens, self._config.max_positions)
        shape = (job.tokens, self._config.hidden_size)
        names = job.inputs
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
        if job.of:
            return await self._go_back(job, inputs, tuning)
        steps = await self._train(job, inputs, tuning)
        if job.keep and not self._draining:
            self._kept.put(self, job, steps.forward, steps.forward.nbytes)
            self._engine.look()
        return steps.results

    async def _go_back(self, job: Job, inputs: Tensors, tuning: Tuning) -> Tensors:
        """What a backward job gives that goes back through what is kept."""
        kept = self._kept.take(self, job)
        if kept is None:
            raise Refusal("forgotten", f"nothing is kept of job {job.of}")
        try:
            return (await self._train(job, inputs, tuning, kept.forward)).results
        finally:
            self._kept.give_back(kept)
            self._engine.look()

    async def _train(
        self, job: Job, inputs: Tensors, tuning: Tuning, forward: ForwardPass | None = None
    ) -> JobSteps:
        load = Load(1, job.tokens)
        steps = await self._engine.train(lambda s: JobSteps(s, job, inputs, tuning, forward), load)
        assert isinstance(steps, JobSteps)
        if steps.refusal is not None:
            raise steps.refusal
        return steps


class _Held:
    """The tuning that a session added, and what it is charged."""

    def __init__(self, opened: OpenTraining, client: str, budget: TuningBudget) -> None:
        self.tuning: Tuning = NOTHING
        self._opened, self._client, self._budget = opened, client, budget
        self._version = 0
        self._bytes = 0
        self._refusal: Refusal | None = None
        self._collector: Collector | None = None

    def begin(self, version: int) -> None:
        """Forget what there is; frames of another come now."""
        self.forget()
        start, end = self._opened.start, self._opened.end
        self._version, self._refusal = version, None
        self._collector = Collector(start, end, self._budget.session_size)

    def take(self, frame: Frame) -> bool:
        """Take a frame; whether it was the last one. Raises ``BadMessage``."""
        if self._collector is not None:
            try:
                self._keep(self._collector, frame)
            except Refusal as refusal:
                self.refuse(refusal)
        return frame.header.get("last") is True

    def _keep(self, collector: Collector, frame: Frame) -> None:
        try:
            taken = collector.take(frame)
        except TooLarge:
            most = readable_bytes(self._budget.session_size)
            raise Refusal(
                "tuning", f"it is larger than the {most} that a session may add"
            ) from None
        self._budget.charge(self._client, self._bytes, collector.nbytes)
        self._bytes = collector.nbytes
        if taken is not None:
            self.tuning, self._collector = taken, None

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
        self._budget.charge(self._client, self._bytes, 0)
        self._bytes = 0
