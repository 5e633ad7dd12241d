"""What a client or a node means by an adapter: found, checked and copied before it is used."""

from types import SimpleNamespace

import pytest
import torch

from petalnode.compute import ComputeThread
from petalnode.errors import UsageError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.tuning.check import check_scale
from petalnode.models.tuning.peft_files import Adapter, save_adapter
from petalnode.models.tuning.tuning import NOTHING
from petalnode.node import NodeOptions, open_node
from petalnode.routing.announcement import MAX_ADAPTER_CHARS, MAX_ADAPTERS
from petalnode.serving.adapters import find_offered, load_offered
from petalnode.session.added import PLAIN, find_added, own_tuning

from .test_adapters import BAD, bad, lora, prompted


@pytest.fixture
def path(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.fixture
def config(path):
    return open_checkpoint(str(path)).config


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
async def test_what_fits_no_block_is_told_before_a_node_is_asked(config, change):
    with pytest.raises(UsageError):
        await find_added(Adapter(bad(config, change)), config, (), ComputeThread())


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
async def test_what_blocks_alone_cannot_run_is_told_before_a_node_is_asked(path, config, change):
    async with open_node(str(path), NodeOptions()) as client:
        with pytest.raises(UsageError):
            await client.open_hidden(0, 4, tuning=bad(config, change)).__aenter__()


async def test_hidden_states_take_the_adapter_of_their_blocks_only(path, config):
    async with open_node(str(path), NodeOptions()) as client:
        with pytest.raises(UsageError, match="has a block 0, but these are the blocks 1:4"):
            await client.open_hidden(1, 4, tuning=lora(config, 1)).__aenter__()


@pytest.mark.parametrize("way", ["session", "hidden"])
async def test_what_becomes_of_an_adapter_later_is_not_the_sessions(config, way):
    """A hop that replaces another must get what that one had."""
    tuning, prompt = prompted(lora(config, 1), 2), torch.ones(3, 64)
    before = [tensor.clone() for _, tensor in tuning.named()]
    if way == "session":
        added = await find_added(Adapter(tuning, prompt), config, (), ComputeThread())
        prompt.zero_()
        assert bool((added.prompt == 1).all())
    else:
        added = await own_tuning(tuning, config, (0, 4), ComputeThread())
    for _, tensor in tuning.named():
        tensor.zero_()
    kept = [tensor for _, tensor in added.tuning.named()]
    assert all(map(torch.equal, kept, before))
    assert (await own_tuning(NOTHING, config, (0, 4), ComputeThread())) is PLAIN


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
    (one,) = find_offered([str(place)] * MAX_ADAPTERS, config)
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


async def test_a_file_is_no_name_of_what_others_offer(config, tmp_path, monkeypatch):
    """Unless it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("law", "mine.safetensors"):
        (tmp_path / name).touch()
    offers = (SimpleNamespace(adapters=("law@00112233",)),)
    assert (await find_added("law", config, offers, ComputeThread())).served == "law@00112233"
    with pytest.raises(UsageError, match=r"'mine\.safetensors' is a file"):
        await find_added("mine.safetensors", config, offers, ComputeThread())
