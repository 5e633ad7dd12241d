"""What a node refuses of those who train, what they may hold, and what one who leaves leaves."""

import pytest
import torch
import trio

from petalnode.errors import NoRoute, PeerMisbehaved, UsageError
from petalnode.models.tuning.tuning import BlockTuning, LowRank, Tuning
from petalnode.p2p.memory import memory_frame_pair
from petalnode.serving import training
from petalnode.serving.session_tuning import TuningBudget
from petalnode.serving.train_session import TrainSession
from petalnode.tensor_frames import TensorCollector, pack_tensors
from petalnode.training import line
from petalnode.training.protocol import MAX_FRAME_BYTES, MAX_QUEUED, Job, OpenTraining
from petalnode.tuning_wire import pack

from .training_swarm import (
    DEADLINE_S,
    HIDDEN,
    at_once,
    error_of,
    numbers,
    open_training_swarm,
    tuning,
)

ALONE = [("a", 0, 4)]
HUGE = Tuning({0: BlockTuning(prompt=torch.full((3, HIDDEN), 3e38))})


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint()


class Talk:
    """A client that says what it likes."""

    def __init__(self, stream):
        self.stream = stream

    async def say(self, header, **tensors):
        for frame in pack_tensors(header, tensors.items(), MAX_FRAME_BYTES):
            await self.stream.send(*frame)

    async def hear(self):
        """The next message but those that say that the node lives; tensors by name."""
        collector = TensorCollector(1 << 30, 1 << 10)
        while True:
            frame = await self.stream.receive()
            if frame is None or frame.header["type"] != "alive":
                if frame is None or "parts" not in frame.header:
                    return frame and frame.header
                if collector.add(frame):
                    return {**frame.header, **collector.tensors}


async def opened(swarm, start=0, end=4, fingerprint=None):
    talk = Talk(await swarm.open_stream("a", ""))
    fingerprint = fingerprint or swarm.checkpoint.fingerprint
    await talk.stream.send(OpenTraining(fingerprint, start, end).to_wire())
    return talk, await talk.hear()


def forward(number=1, lengths=(3,), version=0, start=0, end=4):
    return Job("forward", number, start, end, lengths, version).to_wire()


async def test_sessions_that_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(training, "MAX_SESSIONS_PER_PEER", 2)
    async with open_training_swarm(checkpoint, [("a", 1, 3)]) as swarm:
        for start, end, fingerprint, code in [
            (1, 3, "other", "model"),
            (0, 3, None, "blocks"),
            (1, 4, None, "blocks"),
            (1, 3, None, None),
            (1, 2, None, None),
            (1, 3, None, "busy"),
        ]:
            _, answer = await opened(swarm, start, end, fingerprint)
            assert answer.get("code") == code
        swarm.peers["a"].draining = True
        _, answer = await opened(swarm, 1, 3)
        assert answer["code"] == "draining"


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"type": "hello"}, {}),
        (forward(lengths=(3, 0)), {"x": (3, HIDDEN)}),
        (forward(), {"x": (4, HIDDEN)}),
        (forward(), {"x": (3, HIDDEN + 1)}),
        (forward(), {"y": (3, HIDDEN)}),
        (forward(), {"x": (3, HIDDEN), "g": (3, HIDDEN)}),
        (forward(), {}),
        ({**forward(), "type": "backward"}, {"x": (3, HIDDEN)}),
        ({**forward(), "type": "backward", "of": 7}, {"x": (3, HIDDEN), "g": (3, HIDDEN)}),
        ({**forward(), "type": "backward", "keep": True}, {"x": (3, HIDDEN), "g": (3, HIDDEN)}),
        ({**forward(), "of": 7}, {"x": (3, HIDDEN)}),
        ({**forward(), "keep": 1}, {"x": (3, HIDDEN)}),
        ({**forward(), "type": "backward", "of": -1}, {"g": (3, HIDDEN)}),
        (forward(lengths=(2049,)), {"x": (2049, HIDDEN)}),
        (forward(lengths=(1,) * 257), {"x": (257, HIDDEN)}),
        ({"type": "tuning", "version": 0}, {}),
        ({"type": "tuning", "version": 1}, {"7.prompt": (2, HIDDEN)}),
        ({"type": "tuning", "version": 1}, {"1.mlp.up_proj.a": (2, HIDDEN)}),
    ],
)
async def test_a_broken_protocol_ends_the_stream_and_nothing_else(checkpoint, header, tensors):
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        good, _ = await opened(swarm)
        bad, _ = await opened(swarm)
        await bad.say(header, **{name: torch.zeros(*shape) for name, shape in tensors.items()})
        await bad.stream.wait_broken()
        assert [type(error) for error in swarm.errors] == [PeerMisbehaved]
        await good.say(forward(), x=numbers(3, HIDDEN))
        assert (await good.hear())["type"] == "output"
        server = swarm.peers["a"].server
        assert (server.sessions, server._room.used, server._tunings.used) == (1, 0, 0)


async def test_numbers_that_are_not_are_named(checkpoint):
    x, bad = numbers(3, HIDDEN), numbers(3, HIDDEN)
    bad[1, 1] = float("inf")
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        talk, _ = await opened(swarm)
        await talk.say(forward(1), x=bad)
        answer = await talk.hear()
        assert (answer["id"], answer["code"]) == (1, "numbers")
        assert answer["why"] == (
            "the hidden states for blocks 0:4 hold numbers that are not finite"
        )
        await talk.say(Job("backward", 2, 0, 4, (3,), 0).to_wire(), x=x, g=bad)
        assert (await talk.hear())["why"].startswith("the gradient for blocks 0:4")
        for header, tensors in pack(HUGE, 4096, 1):
            await talk.stream.send(header, tensors)
        await talk.say(forward(3, version=1), x=torch.full((3, HIDDEN), 3e38))
        assert (await talk.hear())["why"].endswith("the numbers become infinite or NaN")
        await talk.say(forward(4), x=x)
        assert (await talk.hear())["type"] == "output"


async def test_a_tuning_that_does_not_fit_fails_those_who_need_it(checkpoint):
    x, pair = numbers(3, HIDDEN), LowRank(numbers(2, 7), numbers(HIDDEN, 2), 1.0)
    wrong = Tuning({1: BlockTuning({"self_attn.q_proj": pair})})
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        talk, _ = await opened(swarm)
        for header, tensors in pack(wrong, 4096, 1):
            await talk.stream.send(header, tensors)
        await talk.say(forward(1, version=1), x=x)
        answer = await talk.hear()
        assert (answer["id"], answer["code"]) == (1, "tuning")
        assert "self_attn.q_proj in block 1" in answer["why"]
        assert swarm.peers["a"].server._tunings.used == 0
        await talk.say(forward(2, version=2), x=x)
        assert (await talk.hear())["code"] == "version"
        await talk.say(forward(3), x=x)
        assert (await talk.hear())["type"] == "output"


async def test_the_nodes_room_for_tunings_is_shared(checkpoint, autojump_clock):
    size, x, said = tuning().nbytes, numbers(3, HIDDEN), []
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        server = swarm.peers["a"].server
        server._tunings = TuningBudget(2 * size + 20)  # of which a peer gets half
        async with swarm.training(report=said.append) as two:
            async with swarm.training() as one:
                await one.forward(x, [3], tuning())
                with trio.move_on_after(30) as scope:
                    await two.forward(x, [3], tuning(2))
                assert scope.cancelled_caught
                assert said
                await one.forward(x, [3], tuning(3))  # in the place of its own
                assert server._tunings.used == size
            await two.forward(x, [3], tuning(2))  # as soon as the other has left


async def test_a_tuning_over_the_limit_is_said_at_once(checkpoint):
    async with open_training_swarm(checkpoint, ALONE) as swarm, swarm.training() as session:
        swarm.peers["a"].server._tunings = TuningBudget(2000)
        with pytest.raises(NoRoute, match=rf"adapter of {tuning().nbytes} bytes .* limit, 1000"):
            await session.forward(numbers(3, HIDDEN), [3], tuning())
        await session.forward(numbers(3, HIDDEN), [3])


async def test_a_row_that_is_too_long_for_every_hop(checkpoint):
    async with open_training_swarm(checkpoint) as swarm, swarm.training() as session:
        swarm.add("a", 0, 4, max_tokens=100)
        with pytest.raises(NoRoute, match="it takes 100 tokens a job, and a row has more"):
            await session.forward(numbers(101, HIDDEN), [101])


async def test_numbers_that_leave_the_blocks_are_a_matter_of_the_client(checkpoint):
    async with open_training_swarm(checkpoint, ALONE) as swarm, swarm.training() as session:
        with pytest.raises(UsageError, match="blocks 0:4 the numbers become infinite or NaN"):
            await session.forward(torch.full((3, HIDDEN), 3e38), [3], HUGE)
        assert not [e for e in swarm.failures if isinstance(e, PeerMisbehaved)]


@pytest.mark.parametrize("damage", ["nan", "shape", "names"])
async def test_a_hop_that_lies_is_passed_over(checkpoint, monkeypatch, damage):
    true, x = TrainSession._computed, numbers(3, HIDDEN)
    damaged = {
        "nan": lambda y: {"x": y["x"] * float("nan")},
        "shape": lambda y: {"x": y["x"][1:]},
        "names": lambda y: {"y": y["x"]},
    }
    liars = [True]

    async def lie(session, job, inputs):
        answer = await true(session, job, inputs)
        return damaged[damage](answer) if liars and liars.pop() else answer

    monkeypatch.setattr(TrainSession, "_computed", lie)
    async with open_training_swarm(checkpoint, [*ALONE, ("b", 0, 4)]) as swarm:
        async with swarm.training() as session:
            output, _ = await session.forward(x, [3])
        assert [type(error) for error in swarm.failures] == [PeerMisbehaved]
    assert error_of(output, at_once(checkpoint, x, [3], x)[0]) < 1e-5


async def test_a_draining_node_is_left_and_what_it_has_is_finished(checkpoint):
    lengths, hidden = [128] * 8, numbers(1024, HIDDEN)
    async with open_training_swarm(checkpoint, ALONE) as swarm, swarm.training() as session:
        peer = swarm.peers["a"]

        def drain(peer_id, kind, stage):
            if peer_id == "a" and not peer.draining:
                peer.draining = True
                swarm.add("b", 0, 4)
                nursery.start_soon(peer.server.drain)

        swarm.on_start = drain
        async with trio.open_nursery() as nursery:
            output, _ = await session.forward(hidden, lengths)
        with trio.fail_after(DEADLINE_S):
            await peer.server.wait_idle()
        assert ("forward", (0, 4)) in swarm.peers["b"].starts
        assert {getattr(error, "code", "gone") for error in swarm.failures} <= {"draining"}
    assert error_of(output, at_once(checkpoint, hidden, lengths, hidden)[0]) < 1e-5


async def test_a_draining_node_without_work_is_let_go(checkpoint):
    async with open_training_swarm(checkpoint, ALONE) as swarm, swarm.training() as session:
        await session.forward(numbers(3, HIDDEN), [3])
        peer = swarm.peers["a"]
        peer.draining = True
        await peer.server.drain()
        with trio.fail_after(DEADLINE_S):
            await peer.server.wait_idle()
        swarm.add("b", 0, 4)
        await session.forward(numbers(3, HIDDEN), [3])
    assert swarm.peers["b"].starts


async def test_a_caller_that_leaves_leaves_the_session_whole(checkpoint):
    hidden, lengths = numbers(1024, HIDDEN), [128] * 8
    async with open_training_swarm(checkpoint, ALONE) as swarm, swarm.training() as session:
        with trio.CancelScope() as scope:
            swarm.on_start = lambda *what: scope.cancel()
            await session.forward(hidden, lengths, tuning())
        assert scope.cancelled_caught
        swarm.on_start = lambda *what: None
        output, _ = await session.forward(hidden, lengths, tuning())
        assert not swarm.failures
        assert len(session.crew.lines) == 1
    assert error_of(output, at_once(checkpoint, hidden, lengths, hidden, tuning())[0]) < 1e-5


async def test_a_client_that_is_gone_is_forgotten_at_once(checkpoint):
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        peer = swarm.peers["a"]
        talk, _ = await opened(swarm)
        for header, tensors in pack(tuning(), 1 << 16, 1):
            await talk.stream.send(header, tensors)
        await talk.say(forward(1, version=1), x=numbers(3, HIDDEN))
        assert (await talk.hear())["type"] == "output"
        peer.engine._compute = Stuck()
        async with trio.open_nursery() as nursery:
            for number in range(MAX_QUEUED + 2):
                job = forward(number + 2, (512,), 1)
                nursery.start_soon(lambda job=job: talk.say(job, x=numbers(512, HIDDEN)))
            while peer.engine.queue_depth < MAX_QUEUED:
                await trio.lowlevel.checkpoint()
            assert peer.server._tunings.used == tuning().nbytes
            assert peer.server._room.used == MAX_QUEUED * 512 * HIDDEN * 4
            nursery.cancel_scope.cancel()
        talk.stream.reset()
        with trio.fail_after(DEADLINE_S):
            await peer.server.wait_idle()
        assert (peer.server._room.used, peer.server._tunings.used) == (0, 0)
        assert peer.engine.queue_depth == 0


class Stuck:
    """``Compute`` that never comes back."""

    async def run(self, function, load=None):
        await trio.sleep_forever()


async def test_jobs_of_all_sessions_have_so_much_room(checkpoint):
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        room = swarm.peers["a"].server._room
        room._size = 2 * 512 * HIDDEN * 4
        talks = [(await opened(swarm))[0] for _ in range(3)]
        peak = 0
        async with trio.open_nursery() as nursery:

            async def send(talk):
                for number in range(2):
                    await talk.say(forward(number + 1, (512,)), x=numbers(512, HIDDEN))

            async def hear(talk):
                for _ in range(2):
                    assert (await talk.hear())["type"] == "output"

            def watch(*what):
                nonlocal peak
                peak = max(peak, room.used)

            swarm.on_start = watch
            for talk in talks:
                nursery.start_soon(send, talk)
                nursery.start_soon(hear, talk)
        assert 0 < peak <= room._size
        assert room.used == 0


async def test_a_hop_that_does_not_open_is_asked_once(checkpoint, autojump_clock):
    lengths, hidden = [128] * 8, numbers(1024, HIDDEN)
    async with open_training_swarm(checkpoint, ALONE) as swarm:
        dial, asked = swarm.open_stream, []

        async def open_stream(peer_id, protocol):
            if peer_id == "mute":
                asked.append(peer_id)
                return memory_frame_pair("client", "mute")[0]
            return await dial(peer_id, protocol)

        swarm.open_stream = open_stream
        swarm.add("mute", 0, 4)
        swarm.speeds = {"mute": 1e-9}
        async with swarm.training() as session:
            await session.forward(hidden, lengths)
    assert asked == ["mute"]
    assert trio.current_time() < 10


async def silent_peer(stream, *, alive):
    """Opens, and never answers a job; may say that it lives."""
    await stream.receive()
    await stream.send({"type": "opened", "max_tokens": 512, "max_tuning": 0})
    while alive:
        await trio.sleep(2)
        await stream.send({"type": "alive", "done": 7})
    await trio.sleep_forever()


@pytest.mark.parametrize(("alive", "after_s"), [(False, line.SILENCE_S), (True, line.STUCK_S)])
async def test_a_hop_that_does_nothing_is_given_up(checkpoint, autojump_clock, alive, after_s):
    x = numbers(3, HIDDEN)
    async with open_training_swarm(checkpoint, ALONE) as swarm, trio.open_nursery() as nursery:
        dial = swarm.open_stream

        async def open_stream(peer_id, protocol):
            if peer_id != "quiet":
                return await dial(peer_id, protocol)
            ours, theirs = memory_frame_pair("client", "quiet")
            nursery.start_soon(lambda: silent_peer(theirs, alive=alive))
            return ours

        swarm.open_stream = open_stream
        swarm.add("quiet", 0, 4)
        swarm.speeds = {"quiet": 1e-9}
        async with swarm.training() as session:
            output, _ = await session.forward(x, [3])
        assert [error.peer_id for error in swarm.failures] == ["quiet"]
        assert after_s <= trio.current_time() < after_s + 5
        nursery.cancel_scope.cancel()
    assert error_of(output, at_once(checkpoint, x, [3], x)[0]) < 1e-5
