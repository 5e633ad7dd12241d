"""What a machine remembers of its speed, and what it makes of a file that is none."""

import errno
import json
from dataclasses import replace

import pytest
import torch

from petalnode.machine import Machine
from petalnode.models.checkpoint import open_checkpoint
from petalnode.node import NodeOptions, open_node
from petalnode.p2p.gossip import Gossip
from petalnode.serving.known_rates import MAX_ENTRIES, KnownRates, Rates, rates_key, rates_path
from petalnode.serving.service import Throughput

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return rates_path()


def test_what_was_put_is_there_for_the_next_process(path):
    KnownRates(path).put("key", Rates(2.0, 30.0))
    assert KnownRates(path).get("key") == Rates(2.0, 30.0)
    assert KnownRates(path).get("another") is None
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"key": [1.0]}',
        b'{"key": [0, 1.0]}',
        b'{"key": [NaN, 1.0]}',
        b'{"key": [Infinity, 1.0]}',
        b'{"key": [1e13, 1.0]}',
        b'{"key": [1' + b"0" * 400 + b", 1.0]}",
        b'{"key": ["1", 2]}',
        b'{"key": [true, 2]}',
        b'{"key": [1.0, 2.0]' + b" " * (1 << 16) + b"}",
    ],
)
def test_a_file_that_is_none_is_as_good_as_nothing(path, stored):
    path.parent.mkdir()
    path.write_bytes(stored)
    known = KnownRates(path)
    assert known.get("key") is None
    known.put("key", Rates(2.0, 30.0))
    assert known.get("key") == Rates(2.0, 30.0)


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    known = KnownRates(tmp_path / "file" / "rates.json")
    known.put("key", Rates(2.0, 30.0))
    assert known.get("key") is None


@pytest.mark.parametrize("call", ["os.replace", "pathlib.Path.write_text"])
def test_a_disk_that_is_full_leaves_nothing_behind(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    KnownRates(path).put("key", Rates(2.0, 30.0))
    monkeypatch.setattr(call, full)
    KnownRates(path).put("key", Rates(3.0, 40.0))
    assert KnownRates(path).get("key") == Rates(2.0, 30.0)
    assert list(path.parent.iterdir()) == [path]


def test_only_so_many_are_kept_the_newest(path):
    known = KnownRates(path)
    for number in range(MAX_ENTRIES + 2):
        known.put(str(number), Rates(1.0, 1.0))
    known.put("2", Rates(1.0, 1.0))
    assert list(json.loads(path.read_text())) == [*map(str, range(3, MAX_ENTRIES + 2)), "2"]


def test_the_key_is_what_a_block_depends_on(tiny_checkpoint):
    config = open_checkpoint(str(tiny_checkpoint())).config
    key = rates_key(config, CPU, "float32", "none")
    same = replace(config, num_blocks=9, vocab_size=7, eos_ids=(3,))
    assert rates_key(same, CPU, "float32", "none") == key
    others = {
        rates_key(replace(config, hidden_size=65), CPU, "float32", "none"),
        rates_key(config, torch.device("meta"), "float32", "none"),
        rates_key(config, CPU, "bfloat16", "none"),
        rates_key(config, CPU, "float32", "nf4"),
    }
    assert len(others | {key}) == 5


async def test_a_node_announces_what_it_measured_last_until_it_has_measured_again(
    tiny_checkpoint, tmp_path, path, monkeypatch
):
    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    key = rates_key(checkpoint.config, CPU, "float32", "none")
    KnownRates(path).put(key, Rates(100.0, 1000.0))
    options = NodeOptions(
        blocks=(0, 2), host="127.0.0.1", identity=tmp_path / "key", device="cpu", dtype="float32"
    )
    machine = Machine(measure=lambda span: Throughput(7.0, 70.0), known_rates=KnownRates(path))
    said = []
    publish = Gossip.publish

    async def listen(gossip, announcement):
        said.append((announcement.state, announcement.decode_tps, announcement.forward_tps))
        await publish(gossip, announcement)

    monkeypatch.setattr(Gossip, "publish", listen)
    async with open_node(checkpoint, options, machine=machine):
        assert said[0] == ("joining", 50.0, 500.0)
        assert ("online", 7.0, 70.0) in said
        assert KnownRates(path).get(key) == Rates(14.0, 140.0)
