"""How many blocks the memory holds, what is said about it, and what a quantized node serves."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from petalnode import node as node_module
from petalnode.cli.output import print_human, print_json
from petalnode.errors import UsageError
from petalnode.events import Memory, Ready
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.config import ModelConfig
from petalnode.models.loading import load_block_span
from petalnode.models.memory import block_bytes, readable_bytes
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.peft_files import Adapter, save_adapter
from petalnode.node import NodeOptions, open_node
from petalnode.serving import service
from petalnode.serving.kept import MAX_AHEAD_BYTES, MAX_KEPT_BYTES
from petalnode.serving.memory_plan import FreeMemory, plan_memory
from petalnode.serving.service import (
    default_ahead_bytes,
    default_kept_bytes,
    default_kv_tokens,
    default_tuning_bytes,
    free_memory,
)
from petalnode.serving.session_tuning import MAX_NODE_TUNING_BYTES

from ..checkpoints import MakeCheckpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tiny_checkpoint: MakeCheckpoint) -> Path:
    """Four blocks, saved in float32."""
    return tiny_checkpoint(intermediate_size=128)


@pytest.fixture
def config(path: Path) -> ModelConfig:
    return open_checkpoint(str(path)).config


def free(count: int) -> FreeMemory:
    return FreeMemory("cpu", count, count)


@pytest.mark.parametrize(("quant", "dtype"), [("none", "float32"), ("nf4", "bfloat16")])
def test_blocks_caches_and_a_block_in_the_making_fit(
    config: ModelConfig, quant: str, dtype: str
) -> None:
    loading = block_bytes(config, 0, 4)
    block = block_bytes(config, 0, 4 if dtype == "float32" else 2, quant)
    plan = partial(plan_memory, config, dtype=dtype, quant=quant)
    for blocks in (1, 2, 4):
        enough = loading + 4 * block * blocks // 3 + 1
        got = plan(free(enough))
        assert (got.fits, got.blocks, got.block, got.loading) == (blocks, blocks, block, loading)
        assert got.blocks * block + loading + got.kv <= enough + 1
        if blocks > 1:
            assert plan(free(enough - 2)).blocks == blocks - 1
    assert plan(free(1 << 40)).blocks == config.num_blocks


def test_not_even_one_block_fits(config: ModelConfig) -> None:
    dense, nf4 = block_bytes(config, 0, 4), block_bytes(config, 0, 4, "nf4")
    with pytest.raises(UsageError) as caught:
        plan_memory(config, free(dense), dtype="float32", quant="none")
    cause, remedy = caught.value.cause, caught.value.remedy
    assert f"it takes {readable_bytes(dense)} in float32" in cause
    assert f"{readable_bytes(dense)} are free on cpu." in cause
    assert f"--quant nf4 ({readable_bytes(nf4)} a block)" in remedy
    with pytest.raises(UsageError, match="in nf4") as caught:
        plan_memory(config, free(0), dtype="float32", quant="nf4")
    assert "--quant" not in caught.value.remedy


def test_the_host_must_hold_what_is_read(config: ModelConfig) -> None:
    tight = FreeMemory("cuda:0", 1 << 40, block_bytes(config, 0, 4) - 1)
    with pytest.raises(UsageError, match=r"free on cuda:0 and .* KiB on the host"):
        plan_memory(config, tight, dtype="bfloat16", quant="none")
    roomy = FreeMemory("cuda:0", 1 << 40, block_bytes(config, 0, 4))
    assert plan_memory(config, roomy, dtype="bfloat16", quant="none").blocks == 4


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_adapters_take_room_in_every_block(config: ModelConfig, quant: str) -> None:
    loading, block = block_bytes(config, 0, 4), block_bytes(config, 0, 4, quant)
    plan = partial(plan_memory, config, dtype="float32", quant=quant)
    enough = loading + 4 * block * 4 // 3 + 1
    assert plan(free(enough)).blocks == 4
    less = plan(free(enough), adapters=block // 3)
    assert (less.blocks, less.block, less.adapters) == (3, block + block // 3, block // 3)
    assert plan(free(enough), adapters=block // 3, wanted=4).blocks == 4
    size = readable_bytes(2 * block)
    with pytest.raises(UsageError, match=rf"takes {size} in .*, {readable_bytes(block)} of that "):
        plan(free(loading + 2 * block), adapters=block)


def test_what_was_asked_for_is_not_doubted(config: ModelConfig) -> None:
    plan = plan_memory(config, free(0), dtype="float32", quant="none", wanted=3)
    assert (plan.fits, plan.blocks, plan.kv) == (0, 3, 0)


def test_the_reasoning_is_one_line(
    tiny_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    config = open_checkpoint(str(tiny_checkpoint())).config
    capsys.readouterr()
    plan = plan_memory(config, free(1 << 30), dtype="float32", quant="int8")
    print_human(plan)
    assert capsys.readouterr().err == (
        "memory: 1.0 GiB free on cpu, less 120.5 KiB to read a block and 256.0 MiB for attention "
        "caches; a block takes 32.2 KiB in int8 and float32, so 4 of 4 blocks fit\n"
    )
    print_human(plan_memory(config, free(0), dtype="float32", quant="nf4", wanted=2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("0 of 4 blocks fit; 2 were asked for")
    assert lines[1].endswith("of a multiple of 64 numbers: mlp.down_proj.weight")
    print_json(plan)
    said = json.loads(capsys.readouterr().out)
    assert said["event"] == "memory"
    assert (said["free"], said["blocks"], said["quant"]) == (1 << 30, 4, "int8")


def test_caches_take_half_of_what_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    span = load_block_span(open_checkpoint(str(path)), 0, 2)
    monkeypatch.setattr("petalnode.serving.service.free_bytes", lambda device: 1_000_000)
    assert default_kv_tokens(span) == 500_000 // (2 * span.kv_bytes_per_token)


def test_what_clients_add_gets_a_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 16 << 20
    monkeypatch.setattr("petalnode.serving.service.free_bytes", lambda device: left)
    assert default_tuning_bytes(CPU) == 1 << 20
    left = 1 << 40
    assert default_tuning_bytes(CPU) == MAX_NODE_TUNING_BYTES


async def test_a_node_that_waits_computes_ahead_within_a_share(path: Path, tmp_path: Path) -> None:
    """All shares together leave something; the engine has spare work of what training keeps."""
    checkpoint = open_checkpoint(str(path))
    options = NodeOptions(host="127.0.0.1", blocks=(0, 4), identity=tmp_path / "key")
    async with open_node(checkpoint, options) as node:
        assert node.service is not None
        kept = node.service.training._kept
        assert node.service.engine._spare is kept
        assert (kept.size, kept.ahead_size) == (MAX_KEPT_BYTES, MAX_AHEAD_BYTES)


def test_what_is_computed_ahead_gets_a_share(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    span = load_block_span(open_checkpoint(str(path)), 0, 2)
    monkeypatch.setattr(service, "free_bytes", lambda device: 32 << 20)
    assert (default_kept_bytes(span), default_ahead_bytes(span)) == (4 << 20, 1 << 20)
    shares = [getattr(service, name) for name in vars(service) if name.endswith("_SHARE")]
    assert len(shares) == 5
    assert sum(shares) < 1


def test_this_machine_has_memory() -> None:
    here = free_memory(CPU)
    assert here.bytes == here.host_bytes > 1 << 20


@pytest.mark.parametrize("quant", ["int8", "nf4"])
async def test_a_quantized_node_says_so(
    path: Path, tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its record, and in the memory that it reports; it holds as many blocks as fit."""
    checkpoint = open_checkpoint(str(path))
    block = block_bytes(checkpoint.config, 0, 4, quant)
    room = block_bytes(checkpoint.config, 0, 4) + 3 * block
    monkeypatch.setattr(node_module, "free_memory", lambda device: free(room))
    events: list[object] = []
    options = NodeOptions(
        num_blocks=None, quant=quant, host="127.0.0.1", identity=tmp_path / "key", device="cpu"
    )
    async with open_node(checkpoint, options, events.append) as node:
        assert node._holding.announcement().quant == quant
        assert node.blocks == (0, 2)
        (plan,) = [event for event in events if isinstance(event, Memory)]
        (ready,) = [event for event in events if isinstance(event, Ready)]
        assert (plan.fits, plan.quant, plan.free) == (2, quant, room)
        assert ready.memory["weights"] == 2 * block


async def test_a_node_with_adapters_holds_fewer_blocks(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they take is known before the span is chosen, and loaded before what is free is shared
    out to caches and clients; these share one room for all sessions."""
    checkpoint = open_checkpoint(str(path))
    config, block = checkpoint.config, block_bytes(checkpoint.config, 0, 4)
    rng = torch.Generator().manual_seed(0)
    lora = new_lora(config, rank=8, alpha=8, targets="all-linear", rng=rng)
    for name in ("law", "poems"):
        save_adapter(tmp_path / name, Adapter(lora), config, str(path))
    added = lora.within(0, 1).nbytes
    room = block + 4 * block * 4 // 3 + 1
    monkeypatch.setattr(node_module, "free_memory", lambda device: free(room))
    order: list[str] = []

    def noting(module: str, name: str) -> None:
        kept = getattr(import_module(module), name)
        monkeypatch.setattr(
            f"{module}.{name}", lambda *args, **rest: (order.append(name), kept(*args, **rest))[1]
        )

    noting("petalnode.holding", "load_offered")
    noting("petalnode.serving.service", "default_kv_tokens")
    events: list[object] = []
    for adapters, blocks in (((), 4), (("law",), 3), (("law", "poems"), 2)):
        options = NodeOptions(
            num_blocks=None,
            host="127.0.0.1",
            identity=tmp_path / "key",
            adapters=tuple(str(tmp_path / name) for name in adapters),
        )
        events.clear()
        async with open_node(checkpoint, options, events.append) as node:
            (plan,) = [event for event in events if isinstance(event, Memory)]
            assert (plan.blocks, plan.adapters) == (blocks, len(adapters) * added)
            assert node.blocks == (0, blocks)
            service = node.service
            assert service is not None
            assert len(service.server.adapters) == len(adapters)
            assert service.server.tunings is service.training._tunings
    assert order == ["default_kv_tokens", *["load_offered", "default_kv_tokens"] * 2]


async def test_a_quantization_that_cannot_be_had(path: Path) -> None:
    with pytest.raises(UsageError, match="no quantization 'int3'"):
        async with open_node(str(path), NodeOptions(num_blocks=1, quant="int3")):
            pass
