"""Adapters over the wire, from clients and hops that mean ill: nothing is kept, nobody waits."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import trio
import trio.testing

from petalnode.compute import ComputeThread
from petalnode.errors import PeerError, PeerGone, PeerMisbehaved, PeerRefused
from petalnode.models.checkpoint import open_checkpoint
from petalnode.p2p.frames import Frame
from petalnode.p2p.memory import memory_frame_pair
from petalnode.protocol import Open, Segment, Step, feed_wire
from petalnode.routing.chain import Hop
from petalnode.serving.rows import Refusal
from petalnode.serving.session_tuning import (
    MAX_NODE_TUNING_BYTES,
    MAX_SESSION_TUNING_BYTES,
    SessionTuning,
    TuningBudget,
)
from petalnode.session import line
from petalnode.session.chain import ChainSetup, open_chain
from petalnode.session.line import TUNING_DEADLINE_S, open_line, tuning_deadline_s
from petalnode.session.recovery import OPEN_DEADLINE_S
from petalnode.simnet.compute import Cost, SimCompute
from petalnode.tuning_wire import pack

from .memory_swarm import open_memory_swarm
from .test_adapters import lora, prompted
from .test_chain import TWO

SESSION = b"s" * 16
ONE = [("a", 0, 4)]
FRAME = 4096


@pytest.fixture
def path(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.fixture
def config(path):
    return open_checkpoint(str(path)).config


async def opened(swarm, adapter="", session=SESSION):
    stream = swarm.dial("client", "a")
    await stream.send(Open(session, swarm.checkpoint.fingerprint, 0, 4, 1, None, adapter).to_wire())
    assert (await stream.receive()).header["type"] == "opened"
    return stream


async def upload(stream, tuning):
    for header, tensors in pack(tuning, FRAME):
        await stream.send(header, tensors)
    return (await stream.receive()).header


def used(swarm):
    return swarm.servers["a"].server.tunings.used


async def test_an_upload_that_breaks_off_leaves_nothing(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        for header, tensors in list(pack(lora(config, 1), FRAME))[:-1]:
            await stream.send(header, tensors)
        await trio.testing.wait_all_tasks_blocked()
        assert used(swarm) > 0
        (session,) = swarm.servers["a"].server._sessions.values()
        came = weakref.ref(session._tuning._collector)
        stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert came() is None
        assert (used(swarm), swarm.servers["a"].server.sessions) == (0, 0)


async def test_what_is_kept_in_float32_is_charged_as_that(path, config):
    tuning = lora(config, 1).map(lambda tensor: tensor.bfloat16())
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        assert (await upload(stream, tuning))["type"] == "tuned"
        assert used(swarm) == 2 * tuning.nbytes
        (session,) = swarm.servers["a"].server._sessions.values()
        assert {t.dtype for _, t in session._tuning.added.named()} == {torch.float32}


async def test_what_is_kept_is_no_more_than_is_charged(config):
    """Tensors of a frame share its memory, which one of them would keep as a whole."""
    budget, span = TuningBudget(), SimpleNamespace(config=config, device=torch.device("cpu"))
    wanted = Open(SESSION, "f" * 32, 0, 4, 1)
    tuning = SessionTuning(wanted, "client", span, ComputeThread(), budget, None)
    header = {"type": "tuning", "version": 0, "parts": [["1.prompt", 1, 0, 1.0]], "last": True}
    assert await tuning.take(Frame(header, [torch.zeros(1000, 64)[:1]]))
    ((_, kept),) = tuning.added.named()
    assert kept.untyped_storage().nbytes() == budget.used == 64 * 4


async def test_what_is_announced_is_charged_before_it_comes(path, config):
    """Else many small frames could have much more allocated than the node has room for."""
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        header = {"type": "tuning", "version": 0, "parts": [["1.prompt", 1000, 0, 1.0]]}
        await stream.send({**header, "last": False}, [torch.zeros(1, 64)])
        await trio.testing.wait_all_tasks_blocked()
        assert used(swarm) == 1000 * 64 * 4


async def test_a_matrix_that_is_too_large_is_refused_as_any_other(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        header = {"type": "tuning", "version": 0, "parts": [["1.prompt", 1 << 24, 0, 1.0]]}
        await stream.send({**header, "last": True}, [torch.zeros(1, 64)])
        answer = (await stream.receive()).header
        assert (answer["type"], answer["code"], used(swarm)) == ("error", "tuning", 0)
        assert answer["why"] == "it is larger than the 128.0 MiB that a session may add"


def test_a_peer_has_a_share_of_a_nodes_room():
    budget = TuningBudget()
    assert (budget.peer_size, budget.session_size) == (1 << 28, MAX_SESSION_TUNING_BYTES)
    budget.charge("a", 0, 1 << 27)
    budget.charge("a", 0, 1 << 27)
    with pytest.raises(
        Refusal, match=r"^your sessions would add more than the 256.0 MiB"
    ) as caught:
        budget.charge("a", 0, 1)
    assert (caught.value.code, budget.used) == ("busy", 1 << 28)
    budget.charge("b", 0, (1 << 28) - 1)
    with pytest.raises(Refusal, match="no room for another adapter"):
        budget.charge("c", 0, 2)
    budget.charge("c", 0, 1)
    assert budget.used == MAX_NODE_TUNING_BYTES
    budget.charge("a", 1 << 27, 0)
    budget.charge("a", 1 << 27, 1)
    assert budget.used == (1 << 28) + 1
    for peer, held in (("a", 1), ("b", (1 << 28) - 1), ("c", 1)):
        budget.charge(peer, held, 0)
    assert (budget.used, budget._held) == (0, {})


async def broken(swarm, why):
    """The session ended because the client broke the protocol, and nothing of it is left."""
    await trio.testing.wait_all_tasks_blocked()
    assert isinstance(swarm.errors[-1], PeerMisbehaved)
    assert why in str(swarm.errors[-1])
    assert (used(swarm), swarm.servers["a"].server.sessions) == (0, 0)


async def test_a_second_one_ends_the_session(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        assert (await upload(stream, lora(config, 1)))["type"] == "tuned"
        header, tensors = next(pack(lora(config, 2), FRAME))
        await stream.send(header, tensors)
        await broken(swarm, "a session that has one")


async def test_one_after_the_first_step_ends_the_session(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        feed = swarm.dial("client", "a")
        await feed.send(feed_wire(SESSION))
        assert (await feed.receive()).header["type"] == "fed"
        step = Step(1, (Segment(0, 0, 1, 1),))
        await feed.send(step.to_wire(), [torch.zeros(1, 64)])
        assert (await stream.receive()).header["type"] == "out"
        header, tensors = next(pack(lora(config, 2), FRAME))
        await stream.send(header, tensors)
        await broken(swarm, "after the first step")


async def test_matrices_are_checked_in_the_worker_thread(path, config):
    """Meanwhile the loop goes on, and a step that comes too early is not computed without them."""
    async with open_memory_swarm(path, ONE) as swarm:
        server, go, checks = swarm.servers["a"].server, trio.Event(), []

        class Slow(ComputeThread):
            async def run(self, function, load=None):
                checks.append(function)
                await go.wait()
                return await super().run(function)

        server._compute = Slow()
        stream = await opened(swarm)
        for header, tensors in pack(lora(config, 1), FRAME):
            await stream.send(header, tensors)
        feed = swarm.dial("client", "a")
        await feed.send(feed_wire(SESSION))
        assert (await feed.receive()).header["type"] == "fed"
        await trio.testing.wait_all_tasks_blocked()
        assert len(checks) == 1
        await feed.send(Step(1, (Segment(0, 0, 1, 1),)).to_wire(), [torch.zeros(1, 64)])
        assert (await stream.receive()).header["type"] == "out"
        go.set()
        with pytest.raises(PeerGone):
            await stream.receive()
        await broken(swarm, "after the first step")


async def test_nothing_refers_to_matrices_of_a_session_that_is_over(path, config):
    """Whatever keeps the session's own objects for a while."""
    async with open_memory_swarm(path, ONE) as swarm:
        swarm.servers["a"].server._compute = SimCompute(Cost(), lambda: 1.0)  # no thread keeps any
        stream = await opened(swarm)
        assert (await upload(stream, lora(config, 1)))["type"] == "tuned"
        (session,) = swarm.servers["a"].server._sessions.values()
        added = weakref.ref(session._tuning.added)
        stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert added() is None


async def test_a_name_that_comes_twice_in_other_digits_ends_the_session(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        parts = [["1.prompt", 1, 0, 1.0], ["01.prompt", 1, 0, 1.0]]
        header = {"type": "tuning", "version": 0, "parts": parts, "last": True}
        await stream.send(header, [torch.zeros(1, 64)] * 2)
        await broken(swarm, "names no tensor")


async def test_an_offered_one_and_an_own_one_are_not_both_taken(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        swarm.servers["a"].server.adapters = {"law": lora(config, 1)}
        stream = await opened(swarm, "law")
        answer = await upload(stream, lora(config, 2))
        assert (answer["type"], answer["code"]) == ("error", "tuning")
        assert "adapter of this node's already" in answer["why"]
        assert used(swarm) == 0


async def test_whoever_was_refused_may_not_go_on_sending(path, config):
    tuning = lora(config, 1)
    async with open_memory_swarm(path, ONE) as swarm:
        swarm.servers["a"].server.tunings = TuningBudget(tuning.nbytes)
        stream = await opened(swarm)
        assert (await upload(stream, tuning))["code"] == "tuning"
        assert used(swarm) == 0
        await stream.send({"type": "where"})
        assert (await stream.receive()).header["type"] == "at"  # it was told once
        assert (await upload(stream, tuning.within(0, 1)))["type"] == "error"
        assert used(swarm) == 0


class Hostile:
    """A hop that opens a session, and then says ``answer`` to whatever it is sent; or nothing."""

    def __init__(self, nursery, answer):
        self.nursery, self.answer = nursery, answer

    async def open_stream(self, peer_id, protocol):
        ours, theirs = memory_frame_pair("client", peer_id)
        self.nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream):
        try:
            await stream.receive()
            await stream.send({"type": "opened"})
            while (frame := await stream.receive()) is not None:
                if frame.header["last"] and self.answer == "close":
                    await stream.aclose()
                elif frame.header["last"] and self.answer is not None:
                    await stream.send(self.answer)
        except PeerError:
            stream.reset()


REFUSED = {"type": "error", "code": "tuning", "why": "it is too large"}
BUSY = {"type": "error", "code": "busy", "why": "no room"}
ANSWERS = {
    "nonsense": ({"type": "at", "seen": 7}, PeerMisbehaved, "did not answer to an adapter"),
    "draining": ({"type": "draining"}, PeerRefused, "is about to leave"),
    "refused": (REFUSED, PeerRefused, "refused the adapter: it is too large"),
    "busy": (BUSY, PeerRefused, "refused the adapter: no room"),
    "close": ("close", PeerGone, "closed the session at once"),
    "nothing": (None, PeerGone, "did not take the adapter in 10 s"),
}


@pytest.mark.parametrize(("answer", "error", "why"), ANSWERS.values(), ids=ANSWERS)
async def test_what_a_hop_answers_is_told_and_blamed_on_it(
    config, answer, error, why, autojump_clock
):
    async with trio.open_nursery() as nursery:
        opener = Hostile(nursery, answer)
        setup = ChainSetup(opener, "client", "f" * 32, 64, tuning=prompted(lora(config, 1), 2))
        with pytest.raises(error, match=why) as caught:
            await open_line(setup, Hop("h", 0, 4), "client")
        nursery.cancel_scope.cancel()
    assert caught.value.peer_id == "h"
    assert ("or a smaller one" in caught.value.remedy) is (answer is REFUSED)


def test_the_time_for_an_upload_grows_with_it(config):
    tuning = lora(config, 1)
    assert tuning_deadline_s(tuning.within(0, 0)) == 0
    assert tuning_deadline_s(tuning) == TUNING_DEADLINE_S + tuning.nbytes / line.SLOWEST_UPLINK


class SlowLine:
    """What is added goes up ``s`` seconds a frame."""

    def __init__(self, swarm, s):
        self.swarm, self.s = swarm, s

    async def open_stream(self, peer_id, protocol):
        stream = await self.swarm.open_stream(peer_id, protocol)
        send = stream.send

        async def slowly(header, tensors=()):
            if header["type"] == "tuning":
                await trio.sleep(self.s)
            await send(header, tensors)

        stream.send = slowly
        return stream


@pytest.mark.parametrize("takes_s", [25, 35])
async def test_a_slow_line_has_the_time_that_it_needs(
    path, config, takes_s, monkeypatch, autojump_clock
):
    tuning = lora(config, 1)
    monkeypatch.setattr(line, "SLOWEST_UPLINK", tuning.nbytes / 20)
    assert OPEN_DEADLINE_S < 25 < tuning_deadline_s(tuning) == 30
    async with open_memory_swarm(path, TWO) as swarm:
        for one in swarm.servers.values():
            one.server._compute = SimCompute(Cost(), lambda: 1.0)  # a thread has no virtual time
        opener, fingerprint = SlowLine(swarm, takes_s), swarm.checkpoint.fingerprint
        setup = ChainSetup(opener, "client", fingerprint, 64, tuning=tuning)
        hops = [Hop(*hop) for hop in TWO]
        if takes_s < 30:
            async with open_chain(setup, hops) as chain:
                assert chain.hops == tuple(hops)
        else:
            with pytest.raises(PeerGone, match="did not take the adapter in 30 s"):
                async with open_chain(setup, hops):
                    pass
