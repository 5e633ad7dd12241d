"""How many blocks the memory holds, what is said about it, and what a quantized node serves."""

import json
from functools import partial
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
from petalnode.node import NodeOptions, open_node
from petalnode.serving.memory_plan import FreeMemory, plan_memory
from petalnode.serving.service import default_kv_tokens, free_memory

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


async def test_a_quantization_that_cannot_be_had(path: Path) -> None:
    with pytest.raises(UsageError, match="no quantization 'int3'"):
        async with open_node(str(path), NodeOptions(num_blocks=1, quant="int3")):
            pass
