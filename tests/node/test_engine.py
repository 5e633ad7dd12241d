"""The span engine: what is gathered into a batch, what errors and cancellations cost."""

import pytest
import torch
import trio

from petalnode.compute import LIGHT, ComputeThread
from petalnode.errors import LocalProtocolError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span
from petalnode.models.span import RowSlice
from petalnode.serving.engine import SPARE_AFTER_S, RowWork, SpanEngine, Turn
from petalnode.serving.scheduler import TURNS_PER_TRAINING_STEP


@pytest.fixture
def span(tiny_checkpoint):
    return load_block_span(open_checkpoint(str(tiny_checkpoint())), 0, 4)


class Recording:
    """A span that notes each forward call's tokens and blocks, and may be told to fail."""

    def __init__(self, span):
        self._span = span
        self.calls = []
        self.failure = None

    def __getattr__(self, name):
        return getattr(self._span, name)

    def forward(self, x, rows, start, end):
        self.calls.append((x.shape[0], start, end))
        if self.failure is not None:
            raise self.failure
        return self._span.forward(x, rows, start, end)


def row(span, n, position=0, start=0, end=4, cache=None):
    return RowWork(cache or span.new_row(start, end), position, n)


async def run_all(engine, *works):
    """Queue all works before the engine starts; their outputs in order."""
    outputs = [None] * len(works)

    async def one(index, work):
        outputs[index] = await engine.run(*work)

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as waiting:
            for index, work in enumerate(works):
                waiting.start_soon(one, index, work)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(engine.serve)
        nursery.cancel_scope.cancel()
    return outputs


async def test_frames_of_all_sessions_are_one_batch(span):
    recording = Recording(span)
    engine = SpanEngine(recording, ComputeThread())
    hidden = torch.randn(3, 64)
    outputs = await run_all(engine, *[(0, 4, [row(span, 1)], hidden[i : i + 1]) for i in range(3)])
    assert recording.calls == [(3, 0, 4)]
    alone = [
        (await run_all(SpanEngine(span, ComputeThread()), (0, 4, [row(span, 1)], h[None])))[0]
        for h in hidden
    ]
    torch.testing.assert_close(torch.cat(outputs), torch.cat(alone), atol=1e-4, rtol=0)


async def test_sub_spans_share_the_blocks_that_they_share(span):
    recording = Recording(span)
    works = [
        (0, 3, [row(span, 1, start=0, end=3)], torch.randn(1, 64)),
        (2, 4, [row(span, 1, start=2, end=4)], torch.randn(1, 64)),
    ]
    outputs = await run_all(SpanEngine(recording, ComputeThread()), *works)
    assert recording.calls == [(1, 0, 2), (2, 2, 3), (1, 3, 4)]
    for (start, end, (done,), hidden), output in zip(works, outputs, strict=True):
        assert done.cache.length == 1
        fresh = (start, end, [row(span, 1, start=start, end=end)], hidden)
        (alone,) = await run_all(SpanEngine(span, ComputeThread()), fresh)
        torch.testing.assert_close(output, alone, atol=1e-4, rtol=0)


async def test_a_long_prompt_is_computed_in_turns_and_comes_back_whole(span):
    recording = Recording(span)
    hidden = torch.randn(600, 64)
    work = (0, 4, [row(span, 600)], hidden)
    (output,) = await run_all(SpanEngine(recording, ComputeThread()), work)
    assert [tokens for tokens, _, _ in recording.calls] == [256, 256, 88]
    (whole,) = [span.forward(hidden, [RowSlice(span.new_row(0, 4), 0, 600)], 0, 4)]
    torch.testing.assert_close(output, whole, atol=1e-3, rtol=1e-3)


async def test_decode_and_prefill_take_turns(span):
    recording = Recording(span)
    engine = SpanEngine(recording, ComputeThread())
    cache = span.new_row(0, 4)
    outputs = []

    async def decode():
        for position in range(6):
            one = row(span, 1, position=position, cache=cache)
            outputs.append(await engine.run(0, 4, [one], torch.randn(1, 64)))

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as waiting:
            waiting.start_soon(decode)
            waiting.start_soon(engine.run, 0, 4, [row(span, 200)], torch.randn(200, 64))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(engine.serve)
        nursery.cancel_scope.cancel()
    sizes = [tokens for tokens, _, _ in recording.calls]
    assert len(outputs) == 6
    assert sizes[:8] == [1, 64, 1, 64, 1, 64, 1, 8]
    assert sum(sizes) == 206


async def test_going_back_truncates_the_row(span):
    engine = SpanEngine(span, ComputeThread())
    first = row(span, 5)
    await run_all(engine, (0, 4, [first], torch.randn(5, 64)))
    await run_all(engine, (0, 4, [row(span, 1, position=2, cache=first.cache)], torch.randn(1, 64)))
    assert first.cache.length == 3


async def test_a_failed_turn_is_told_to_those_in_it_and_the_engine_goes_on(span, caplog):
    recording = Recording(span)
    engine = SpanEngine(recording, ComputeThread())
    recording.failure = RuntimeError("out of memory")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.serve)
        bad = row(span, 1)
        with pytest.raises(LocalProtocolError, match="out of memory"):
            await engine.run(0, 4, [bad], torch.randn(1, 64))
        assert bad.cache.length == 0
        recording.failure = None
        await engine.run(0, 4, [bad], torch.randn(1, 64))
        assert bad.cache.length == 1
        nursery.cancel_scope.cancel()


async def test_a_cancelled_frame_leaves_the_queue(span):
    engine = SpanEngine(span, ComputeThread())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run, 0, 4, [row(span, 1)], torch.randn(1, 64))
        await trio.testing.wait_all_tasks_blocked()
        assert engine.queue_depth == 1
        nursery.cancel_scope.cancel()
    assert engine.queue_depth == 0


class Inline:
    """``Compute`` without a thread, so that what happens in turn can be seen in turn."""

    async def run(self, function, load=None):
        await trio.lowlevel.checkpoint()
        return function()


class Steps:
    """A training job of so many steps, which notes each, and may fail in one."""

    def __init__(self, name, count, noted, fails_at=0):
        self.name, self.steps_left, self.noted, self.fails_at = name, count, noted, fails_at

    def step(self):
        if self.steps_left == self.fails_at:
            raise RuntimeError("no memory left")
        self.noted.append(self.name)
        self.steps_left -= 1


def job(name, count, noted, **options):
    return lambda span: Steps(name, count, noted, **options)


class Noting:
    """A span that notes its forward calls beside training steps."""

    def __init__(self, span, noted):
        self._span, self.noted = span, noted

    def __getattr__(self, name):
        return getattr(self._span, name)

    def forward(self, x, rows, start, end):
        self.noted.append("prefill" if x.shape[0] > 8 else "decode")
        return self._span.forward(x, rows, start, end)


async def test_decode_goes_first_then_prefill_then_training(span):
    noted = []
    engine = SpanEngine(Noting(span, noted), Inline())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.train, job("train", 2, noted), LIGHT)
        nursery.start_soon(engine.run, 0, 4, [row(span, 300)], torch.randn(300, 64))
        nursery.start_soon(engine.run, 0, 4, [row(span, 1)], torch.randn(1, 64))
        await trio.testing.wait_all_tasks_blocked()
        assert engine.queue_depth == 3
        nursery.start_soon(engine.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert noted[0] == "decode"
    assert noted[-2:] == ["train", "train"]
    assert set(noted[1:-2]) == {"prefill"}
    assert engine.training_steps == 2


async def test_a_token_waits_for_one_training_step_at_most(span):
    noted, waited = [], []
    engine = SpanEngine(Noting(span, noted), Inline())

    async def decode():
        for _ in range(5):
            already = len(noted)
            await engine.run(0, 4, [row(span, 1)], torch.randn(1, 64))
            waited.append(noted[already:].index("decode"))
            for _ in range(3):
                await trio.lowlevel.checkpoint()  # the client chooses its next token

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.train, job("train", 40, noted), LIGHT)
        nursery.start_soon(engine.serve)
        await decode()
        nursery.cancel_scope.cancel()
    assert max(waited) == 1  # the step that ran when it came
    assert "train" in noted


async def test_training_is_not_starved_by_work_that_never_ends(span):
    noted = []
    engine = SpanEngine(Noting(span, noted), Inline())
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(engine.run, 0, 4, [row(span, 2048)], torch.randn(2048, 64))
        nursery.start_soon(engine.train, job("train", 3, noted), LIGHT)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(engine.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    turns = ["prefill"] * TURNS_PER_TRAINING_STEP
    assert noted == [*turns, "train", *turns, "train", "train"]


async def test_jobs_are_computed_one_after_the_other(span):
    noted = []
    engine = SpanEngine(span, Inline())
    async with trio.open_nursery() as nursery:
        for name in ("one", "two"):
            nursery.start_soon(engine.train, job(name, 2, noted), LIGHT)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(engine.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert noted == ["one", "one", "two", "two"]


async def test_a_job_that_fails_is_told_to_its_own_client(span, caplog):
    noted = []
    engine = SpanEngine(span, Inline())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.serve)
        with pytest.raises(LocalProtocolError, match="no memory left"):
            await engine.train(job("bad", 3, noted, fails_at=2), LIGHT)
        steps = await engine.train(job("good", 2, noted), LIGHT)
        assert steps.steps_left == 0
        nursery.cancel_scope.cancel()
    assert noted == ["bad", "good", "good"]
    assert engine.queue_depth == 0


async def test_a_cancelled_job_is_dropped_at_its_next_step(span):
    noted, scope = [], trio.CancelScope()
    engine = SpanEngine(span, Inline())

    class Leaving(Steps):
        def step(self):
            super().step()
            scope.cancel()

    async def client():
        with scope:
            await engine.train(lambda span: Leaving("left", 9, noted), LIGHT)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
        nursery.start_soon(engine.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(noted) <= 3  # whose turn is next, the engine's or the client's, is up to trio
    assert engine.queue_depth == 0


class SpareSteps:
    """So many turns of spare work, noted; `fails_at` that many left it fails."""

    def __init__(self, noted, count, fails_at=None):
        self.noted, self.count, self.fails_at = noted, count, fails_at
        self.failures = []

    def spare_turn(self):
        if not self.count:
            return None
        self.count -= 1

        def step():
            self.noted.append("spare")
            if self.count == self.fails_at:
                raise MemoryError("no memory left")

        return Turn("spare work", step, LIGHT, lambda _: None, self.failures.append)


async def test_spare_work_waits_for_all_other(span, autojump_clock):
    """It is looked for when the engine has nothing to do, and when it is told to look."""
    noted = []
    spare = SpareSteps(noted, 2)
    engine = SpanEngine(Noting(span, noted), Inline(), spare)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.train, job("train", 2, noted), LIGHT)
        nursery.start_soon(engine.run, 0, 4, [row(span, 300)], torch.randn(300, 64))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(engine.serve)
        await trio.testing.wait_all_tasks_blocked()
        assert noted[-4:] == ["train", "train", "spare", "spare"]
        noted.clear()
        spare.count = 1
        await trio.sleep(60)
        assert noted == []
        engine.look()
        await trio.testing.wait_all_tasks_blocked()
        assert noted == ["spare"]
        nursery.cancel_scope.cancel()
    assert engine.training_steps == 2


async def test_spare_work_waits_while_somebody_decodes(span, autojump_clock):
    noted = []
    engine = SpanEngine(Noting(span, noted), Inline(), SpareSteps(noted, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run, 0, 4, [row(span, 1)], torch.randn(1, 64))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(engine.serve)
        await trio.sleep(SPARE_AFTER_S * 0.9)
        await engine.run(0, 4, [row(span, 1)], torch.randn(1, 64))
        engine.look()
        await trio.sleep(SPARE_AFTER_S * 0.9)
        assert noted == ["decode", "decode"]
        await trio.sleep(SPARE_AFTER_S * 0.2)
        assert noted == ["decode", "decode", "spare"]
        nursery.cancel_scope.cancel()


async def test_spare_work_that_fails_is_told_to_its_owner(span, caplog):
    noted = []
    spare = SpareSteps(noted, 2, fails_at=1)
    engine = SpanEngine(span, Inline(), spare)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.serve)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert noted == ["spare", "spare"]
    assert [str(error) for error in spare.failures] == ["no memory left"]
