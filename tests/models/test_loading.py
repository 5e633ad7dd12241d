"""Opening and loading checkpoints from directories: what is read, and each error's sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalnode.errors import ModelError, UsageError
from petalnode.models import loading
from petalnode.models.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from petalnode.models.families.family import EMBED, HEAD
from petalnode.models.families.llama import llama_block
from petalnode.models.layers.weights import TorchParts
from petalnode.models.layout import block_layout
from petalnode.models.loading import load_block_span, load_client

from ..checkpoints import MakeCheckpoint

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copy(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def edit_json(path: Path, edit: Edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_weights(path: Path, edit: Edit) -> None:
    weights = load_file(path / SINGLE)
    edit(weights)
    save_file(weights, path / SINGLE)


def error(path: Path | str) -> str:
    """Return the sentence that opening fails with."""
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(path))
    assert caught.value.cause.endswith(".")
    assert caught.value.remedy.endswith(".")
    return str(caught.value)


def test_layout_names_what_the_block_fills(tiny_checkpoint: MakeCheckpoint) -> None:
    config = open_checkpoint(str(tiny_checkpoint(attention_bias=True, mlp_bias=True))).config
    parts = TorchParts(torch.float32, torch.device("cpu"))
    llama_block(parts, config, 0)
    layout = block_layout(config, 0)
    assert parts.targets.keys() == layout.keys()
    assert parts.nbytes == sum(spec.numel for spec in layout.values()) * 4


def test_shards_give_the_same_model(tiny_checkpoint: MakeCheckpoint) -> None:
    whole = open_checkpoint(str(tiny_checkpoint()))
    parts = open_checkpoint(str(tiny_checkpoint(max_shard_size="60KB")))
    names = [f"model.layers.{i}.{n}" for i in range(4) for n in block_layout(whole.config, i)]
    in_parts = {n: t.clone() for n, t in parts.tensors(names)}
    assert len(in_parts) == len(names)
    for name, tensor in whole.tensors(names):
        assert torch.equal(tensor, in_parts[name])


def test_only_the_own_shards_are_opened(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """After opening, the other blocks' shards may vanish."""
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(max_shard_size="60KB"), path)
    checkpoint = open_checkpoint(str(path))
    where = json.loads((path / INDEX).read_text())["weight_map"]
    mine = {s for n, s in where.items() if n.startswith(("model.layers.1.", "model.layers.2."))}
    for shard in set(where.values()) - mine:
        (path / shard).unlink()
    assert load_block_span(checkpoint, 1, 3, **CPU).param_bytes > 0
    assert {where[EMBED], where[HEAD]} - mine
    with pytest.raises(ModelError):
        load_client(checkpoint, **CPU)


def test_progress_and_sizes(tiny_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    seen: list[tuple[int, int]] = []
    span = load_block_span(checkpoint, 1, 4, **CPU, progress=lambda a, b: seen.append((a, b)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    per_block = sum(spec.numel for spec in block_layout(checkpoint.config, 1).values())
    assert span.param_bytes == 3 * per_block * 4
    assert span.kv_bytes_per_token == 2 * 2 * 16 * 4


def test_a_tied_head_shares_memory(tiny_checkpoint: MakeCheckpoint) -> None:
    tied = load_client(open_checkpoint(str(tiny_checkpoint(tie_word_embeddings=True))), **CPU)
    untied = load_client(open_checkpoint(str(tiny_checkpoint())), **CPU)
    table = 384 * 64 * 4
    assert (tied.param_bytes, untied.param_bytes) == (table + 256, 2 * table + 256)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 1), (0, 5)])
def test_blocks_out_of_range(tiny_checkpoint: MakeCheckpoint, start: int, end: int) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    with pytest.raises(UsageError, match=r"out of range.* 0:4"):
        load_block_span(checkpoint, start, end, **CPU)


@pytest.mark.parametrize("typed", [False, True])
def test_more_blocks_than_memory(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, typed: bool
) -> None:
    """Both kinds of error are torch's own."""

    def block(*_: object) -> None:
        if typed:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        torch.empty(1 << 50)

    monkeypatch.setattr(loading, "_load_block", block)
    with pytest.raises(UsageError, match=r"memory of cpu was used up when block 1 .*--num-blocks"):
        load_block_span(open_checkpoint(str(tiny_checkpoint())), 1, 3, **CPU)


def test_the_peak_is_the_span(tmp_path: Path) -> None:
    """A bfloat16 file loaded as float32: resident memory grows by little more than the span."""
    code = f"""
import json, sys, torch
from safetensors.torch import save_file
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span
from petalnode.models.families import read_config
from petalnode.models.layout import expected_layout
torch.set_num_threads(1)
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
raw = dict(model_type="llama", hidden_size=512, num_attention_heads=8, num_hidden_layers=16,
           vocab_size=64, intermediate_size=1536, num_key_value_heads=4)
open("config.json", "w").write(json.dumps(raw))
if sys.argv[1] == "write":
    layout = expected_layout(read_config(raw))
    zeros = {{n: torch.zeros(s.shape, dtype=torch.bfloat16) for n, s in layout.items()}}
    save_file(zeros, "{SINGLE}")
else:
    checkpoint = open_checkpoint(".")
    next(checkpoint.tensors(["model.norm.weight"]))  # imports
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    before = peak()
    span = load_block_span(checkpoint, 0, 16, dtype=torch.float32, device=torch.device("cpu"))
    grown = peak() - before
    print(grown / span.param_bytes)
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, mode],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for mode in ("write", "read")
    ]
    assert 0.8 < float(outputs[1]) < 1.2


def test_the_demo_model_needs_no_path() -> None:
    demo = open_checkpoint("demo")
    assert (demo.name, demo.config.family) == ("demo", "llama")
    assert len(demo.fingerprint) == 32


def test_fingerprint_follows_content_not_place(copy: Path, tiny_checkpoint: MakeCheckpoint) -> None:
    original = open_checkpoint(str(tiny_checkpoint())).fingerprint
    assert open_checkpoint(str(copy)).fingerprint == original
    edit_json(copy / "config.json", lambda c: c.update(transformers_version="0.1", use_cache=False))
    assert open_checkpoint(str(copy)).fingerprint == original
    edit_json(copy / "config.json", lambda c: c.update(rms_norm_eps=1e-4))
    changed = open_checkpoint(str(copy)).fingerprint
    assert changed != original
    edit_weights(copy, lambda w: w["model.norm.weight"].add_(1e-3))
    rewritten = open_checkpoint(str(copy)).fingerprint
    assert rewritten not in (original, changed)
    edit_weights(copy, lambda w: w["model.norm.weight"].add_(1e-3))  # the size stays the same
    assert open_checkpoint(str(copy)).fingerprint not in (original, changed, rewritten)


def test_fingerprint_is_remembered(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_weights(copy, lambda w: None)
    first = open_checkpoint(str(copy)).fingerprint
    stat = (copy / SINGLE).stat()
    edit_weights(copy, lambda w: w["model.norm.weight"].add_(1e-3))
    os.utime(copy / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_checkpoint(str(copy)).fingerprint == first, "the file was hashed again"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "config-is-a-file"))
    (tmp_path / "config-is-a-file").write_text("no directory")
    assert open_checkpoint(str(copy)).fingerprint != first, "best effort: hashed without a cache"


def test_no_such_directory(tmp_path: Path) -> None:
    assert f"no directory '{tmp_path / 'nowhere'}'" in error(tmp_path / "nowhere")
    assert "no directory 'nowhere'" in error("nowhere")
    assert "no directory './a/b'" in error("./a/b")
    file = tmp_path / "model.gguf"
    file.touch()
    assert "is a file" in error(file)


def test_a_revision_of_what_has_none(copy: Path) -> None:
    for model in ("demo", str(copy)):
        with pytest.raises(UsageError, match=r"not a hub repo and has no revision 'v2'"):
            open_checkpoint(model, revision="v2")
    with pytest.raises(UsageError, match=r"Two revisions are asked for: 'v1' in .*, and 'v2'"):
        open_checkpoint("org/name@v1", revision="v2")


def test_no_config(tmp_path: Path) -> None:
    assert "has no config.json" in error(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000])
def test_broken_config(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in error(copy)


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        open_checkpoint(str(copy)).tokenizer()
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="is not a tokenizer"):
        open_checkpoint(str(copy)).tokenizer()


def test_only_pickled_weights(copy: Path) -> None:
    (copy / SINGLE).rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin" in error(copy)
    (copy / "pytorch_model.bin").unlink()
    assert f"has no {SINGLE}" in error(copy)


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -1000])
def test_truncated_weights(copy: Path, keep: int) -> None:
    content = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(content[:keep])
    assert "truncated" in error(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8 + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        (18).to_bytes(8, "little") + b'{"a":{"dtype":"I"}}',
    ],
)
def test_absurd_headers(copy: Path, header: bytes) -> None:
    (copy / SINGLE).write_bytes(header)
    assert "damaged or truncated" in error(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F31"},
        {"dtype": ["F32"]},
        {"shape": [-1, -64]},
        {"shape": [1 << 60, 1 << 60]},
        {"shape": [1] * 9},
        {"shape": [32]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 1 << 62]},
    ],
)
def test_headers_that_lie(copy: Path, change: dict[str, Any]) -> None:
    content = (copy / SINGLE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["model.norm.weight"] |= change
    raw = json.dumps(header).encode()
    (copy / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + size :])
    assert "describes the tensor 'model.norm.weight' wrongly" in error(copy)


def test_git_lfs_pointer(copy: Path) -> None:
    (copy / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in error(copy)


def test_missing_and_leftover_tensors(copy: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    edit_weights(copy, lambda w: w.pop(name))
    assert f"lacks the tensor '{name}'" in error(copy)
    edit_weights(copy, lambda w: w.update({name: torch.zeros(96, 64), "extra": torch.zeros(1)}))
    assert "tensor 'extra'" in error(copy)


def test_tensors_that_carry_nothing(copy: Path) -> None:
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_weights(copy, lambda w: w.update(computed))
    open_checkpoint(str(copy))


def test_wrong_shape_and_dtype(copy: Path) -> None:
    name = "model.layers.3.self_attn.k_proj.weight"
    edit_weights(copy, lambda w: w.update({name: torch.zeros(64, 32)}))
    message = error(copy)
    assert name in message
    assert "[64, 32]" in message
    assert "[32, 64]" in message
    edit_weights(copy, lambda w: w.update({name: torch.zeros((32, 64), dtype=torch.int8)}))
    assert f"{name!r} has the dtype I8" in error(copy)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "a.bin", 3, None])
def test_index_stays_in_the_directory(copy: Path, shard: Any) -> None:
    (copy / SINGLE).unlink()
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert "not the name of a safetensors file" in error(copy)


def test_one_file_goes_before_a_stale_index(copy: Path) -> None:
    """Left behind by an earlier, larger model; transformers takes the one file too."""
    fingerprint = open_checkpoint(str(copy)).fingerprint
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}))
    assert open_checkpoint(str(copy)).fingerprint == fingerprint


def test_index_without_its_shard(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(max_shard_size="60KB"), path)
    first = min(path.glob("*.safetensors"))
    first.unlink()
    assert f"has no {first.name}" in error(path)


def test_index_that_names_the_wrong_shard(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(max_shard_size="60KB"), path)
    where = json.loads((path / INDEX).read_text())["weight_map"]
    other = next(shard for shard in where.values() if shard != where[EMBED])
    edit_json(path / INDEX, lambda index: index["weight_map"].update({EMBED: other}))
    assert f"{other} lacks the tensor '{EMBED}'" in error(path)


def test_errors_come_without_torch(tmp_path: Path) -> None:
    code = "import sys, petalnode.models.checkpoint as c, petalnode.models.text; "
    code += "c.open_checkpoint('demo').tokenizer(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_checkpoint_is_named_as_asked(tiny_checkpoint: MakeCheckpoint) -> None:
    path = tiny_checkpoint()
    checkpoint: Checkpoint = open_checkpoint(str(path))
    assert checkpoint.name == str(path)
