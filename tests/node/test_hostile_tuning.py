"""Adapters over the wire, from clients and hops that mean ill: nothing is kept, nobody waits."""

from types import SimpleNamespace

import pytest
import torch
import trio
import trio.testing

from petalnode.compute import ComputeThread
from petalnode.errors import PeerError, PeerGone, PeerMisbehaved, PeerRefused, UsageError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.check import check_scale
from petalnode.models.tuning.peft_files import Adapter, save_adapter
from petalnode.p2p.memory import memory_frame_pair
from petalnode.protocol import Open, Segment, Step, feed_wire
from petalnode.routing.announcement import MAX_ADAPTER_CHARS
from petalnode.routing.chain import Hop
from petalnode.serving import session_tuning
from petalnode.serving.adapters import find_offered, load_offered
from petalnode.session import line
from petalnode.session.added import find_added
from petalnode.session.chain import ChainSetup, open_chain
from petalnode.session.line import TUNING_DEADLINE_S, open_line, tuning_deadline_s
from petalnode.session.recovery import OPEN_DEADLINE_S
from petalnode.tuning_wire import pack

from .memory_swarm import open_memory_swarm
from .test_adapters import BAD, bad, lora, prompted
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
    return swarm.servers["a"].server._tuning_budget.used


async def test_an_upload_that_breaks_off_leaves_nothing(path, config):
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        for header, tensors in list(pack(lora(config, 1), FRAME))[:-1]:
            await stream.send(header, tensors)
        await trio.testing.wait_all_tasks_blocked()
        assert used(swarm) > 0
        stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert (used(swarm), swarm.servers["a"].server.sessions) == (0, 0)


async def test_what_is_kept_in_float32_is_charged_as_that(path, config):
    tuning = lora(config, 1).map(lambda tensor: tensor.bfloat16())
    async with open_memory_swarm(path, ONE) as swarm:
        stream = await opened(swarm)
        assert (await upload(stream, tuning))["type"] == "tuned"
        assert used(swarm) == 2 * tuning.nbytes
        (session,) = swarm.servers["a"].server._sessions.values()
        assert {t.dtype for _, t in session._tuning.added.named()} == {torch.float32}


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


async def test_whoever_was_refused_may_not_go_on_sending(path, config, monkeypatch):
    tuning = lora(config, 1)
    async with open_memory_swarm(path, ONE) as swarm:
        monkeypatch.setattr(session_tuning, "MAX_SESSION_TUNING_BYTES", tuning.nbytes // 2)
        stream = await opened(swarm)
        assert (await upload(stream, tuning))["code"] == "tuning"
        assert used(swarm) == 0
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


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
async def test_what_fits_no_block_is_told_before_a_node_is_asked(config, change):
    with pytest.raises(UsageError):
        await find_added(Adapter(bad(config, change)), config, (), ComputeThread())


async def test_a_directory_here_comes_before_what_others_offer(config, tmp_path, monkeypatch):
    save_adapter(tmp_path / "law", Adapter(lora(config, 1)), config, "m")
    monkeypatch.chdir(tmp_path)
    offers = (SimpleNamespace(adapters=("law@00112233", "poems@00112233")),)
    own = await find_added("law", config, offers, ComputeThread())
    assert (own.served, list(own.tuning.blocks)) == ("", [0, 1, 2, 3])
    served = await find_added("poems", config, offers, ComputeThread())
    assert (served.served, served.tuning.blocks) == ("poems@00112233", {})


@pytest.mark.parametrize("name", ["Öl", "new\nline", "x" * 88])
def test_names_that_cannot_be_announced(config, tmp_path, name):
    save_adapter(tmp_path / name, Adapter(lora(config, 1)), config, "m")
    with pytest.raises(UsageError, match="cannot be announced"):
        find_offered([str(tmp_path / name)], config)


def test_the_longest_name_that_can_be_announced(config, tmp_path):
    place = tmp_path / ("x" * (MAX_ADAPTER_CHARS - 9))
    save_adapter(place, Adapter(lora(config, 1)), config, "m")
    (one,) = find_offered([str(place), str(place)], config)
    assert len(one.name) == MAX_ADAPTER_CHARS


def test_more_adapters_than_an_announcement_has_room_for(config):
    with pytest.raises(UsageError, match="Offer at most 8"):
        find_offered([f"n{number}" for number in range(9)], config)


def test_files_that_change_after_they_were_named(config, tmp_path):
    save_adapter(tmp_path, Adapter(lora(config, 1)), config, "m")
    offered = find_offered([str(tmp_path)], config)
    save_adapter(tmp_path, Adapter(lora(config, 2)), config, "m")
    with pytest.raises(UsageError, match="have changed since"):
        load_offered(offered, config, (0, 4), torch.device("cpu"))


@pytest.mark.parametrize("scale", [10**400, -(10**400), float("nan"), float("inf"), 1e7])
def test_scales_that_are_no_ordinary_numbers(scale):
    with pytest.raises(UsageError, match="has the scale") as caught:
        check_scale(scale, "It")
    assert len(caught.value.cause) < 100
