"""int8 and nf4: bit for bit bitsandbytes' layers, and whole models against transformers with them.

Tolerances: nf4 rounds weights alone, so float32 logits differ by float rounding (1e-4). int8 rounds
activations too: where ours and transformers' differ in the last bit, one may round to the next
step. That is rare, so float32 logits are within 1 % (relative 2-norm), and every greedy token is
one that transformers rates within 0.01 of its best.
"""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import petalnode.models.layers.weights as weights
from petalnode.errors import ModelError, UsageError
from petalnode.models import quantize
from petalnode.models.checkpoint import SINGLE, Checkpoint, open_checkpoint
from petalnode.models.families import family_of, read_config
from petalnode.models.layers.adapted import AdaptedLinear
from petalnode.models.layers.weights import TorchParts
from petalnode.models.layout import expected_layout
from petalnode.models.loading import load_block_span
from petalnode.models.memory import QUANTS, block_bytes, left_dense
from petalnode.models.quantize import check_quant, quantized_linear

from ..checkpoints import MakeCheckpoint
from . import reference
from .bnb_reference import bnb_layer, load_quantized, regret, relative
from .parity import prompt
from .reference import Local, load_reference, reference_generate, reference_logits
from .shapes import SHAPES

CPU = torch.device("cpu")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
BITS = ("int8", "nf4")
TOLERANCES = {"int8": 1e-2, "nf4": 1e-5}
WIDE: dict[str, Any] = {"intermediate_size": 128, "attention_bias": True, "mlp_bias": True}
"""A Llama whose every matrix has rows of a multiple of 64 numbers."""


@pytest.fixture(params=BITS)
def quant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def quantized(quant: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `Local` load quantized spans."""
    loader = partial(load_block_span, quant=quant)
    monkeypatch.setattr(reference, "load_block_span", loader)
    return quant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (192, 97), (128, 200)])
def test_layers_are_those_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, quant: str, dtype: str, inputs: int, outputs: int
) -> None:
    """Filled slice by slice, in two pieces; tokens with and without outliers, one and many."""
    monkeypatch.setattr(quantize, "SLICE_NUMBERS", 1000)
    which = getattr(torch, dtype)
    torch.manual_seed(inputs)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs).to(which)
    layer = quantized_linear(outputs, inputs, bias, which, CPU, quant)
    assert layer is not None
    layer.fill(0, weight[:7])
    layer.fill(7, weight[7:])
    theirs = bnb_layer(weight.to(which), bias, quant)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, inputs).to(which)
        for outlier in (0.0, 1e5 if which is not torch.float16 else 3e4):
            x[-1, 5] += outlier
            with torch.inference_mode():
                assert torch.equal(layer(x), theirs(x))
                assert torch.equal(layer(x.unsqueeze(1)), theirs(x).unsqueeze(1))


def test_large_matrices_go_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    weight, bias, x = torch.randn(97, 64), torch.randn(97), torch.randn(3, 64)
    outs = []
    for numbers in (1 << 20, 64 * 10, 1):
        monkeypatch.setattr(quantize, "EXPANDED_NUMBERS", numbers)
        layer = quantized_linear(97, 64, bias.clone(), torch.float32, CPU, "nf4")
        assert layer is not None
        layer.fill(0, weight)
        outs.append(layer(x))
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])


def test_outliers_are_kept() -> None:
    """Were a large activation rounded with the rest of its token, the rest would vanish."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    x[1, 9] = 1000.0
    layer = quantized_linear(48, 64, None, torch.float32, CPU, "int8")
    assert layer is not None
    layer.fill(0, weight)
    assert relative(layer(x), x @ weight.T) < 0.02
    small = x.clone()
    small[1, 9] = 0.0
    left = layer(x)[1] - 1000.0 * layer(torch.eye(64)[9:10])[0]
    assert relative(left, small[1] @ weight.T) < 0.05


def test_a_matrix_of_other_rows_stays_dense(tiny_checkpoint: MakeCheckpoint) -> None:
    """NF4's groups of 64 must not span rows: else a fused layer had other groups than its parts."""
    assert quantized_linear(48, 96, None, torch.float32, CPU, "nf4") is None
    assert quantized_linear(48, 75, None, torch.float32, CPU, "int8") is not None
    config = open_checkpoint(str(tiny_checkpoint())).config
    assert left_dense(config, 0, "nf4") == ("mlp.down_proj.weight",)
    assert left_dense(config, 0, "int8") == left_dense(config, 0, "none") == ()


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3)])
def test_a_llama_equals_transformers(
    tiny_checkpoint: MakeCheckpoint, quantized: str, cuts: tuple[int, ...]
) -> None:
    path = tiny_checkpoint(**WIDE)
    theirs, ids = load_quantized(path, quantized), prompt(150, 384)
    local = Local(path, cuts=cuts)
    logits = local.step([local.row()], [ids])
    expected = reference_logits(theirs, ids)
    assert relative(logits, expected) < TOLERANCES[quantized]
    exact = reference_logits(load_reference(path), ids)
    assert relative(expected, exact) > 0.05, "the reference is not quantized"
    assert local.generate(ids[:9], 40) == reference_generate(theirs, ids[:9], 40)


def test_the_demo_model_equals_transformers(quantized: str) -> None:
    """A trained model: the text comes out the same, but for ties that int8 breaks otherwise."""
    import petalnode.demo

    path = Path(petalnode.demo.__file__).parent
    theirs, ids = load_quantized(path, quantized), prompt(100, 2048)
    local = Local(path, cuts=(3, 4))
    logits = local.step([local.row()], [ids])
    assert relative(logits, reference_logits(theirs, ids)) < TOLERANCES[quantized]
    start = open_checkpoint("demo").tokenizer().encode("def fibonacci(n):\n")
    text = local.generate(start, 60)
    assert regret(theirs, start, text) < 0.01
    assert text == reference_generate(theirs, start, 60) or quantized == "int8"


@pytest.mark.parametrize("family", [f for f in ("bloom", "qwen2") if f in SHAPES])
def test_other_families_equal_transformers(
    tiny_checkpoint: MakeCheckpoint, quantized: str, family: str
) -> None:
    """Rows that are reordered on loading (BLOOM), fused layers with biases (Qwen2)."""
    sizes = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 128}
    heads = {"bloom": {"n_layer": 2, "n_head": 4}, "qwen2": {"num_hidden_layers": 2}}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
    overrides = sizes | heads[family] | (more if family == "qwen2" else {})
    path = tiny_checkpoint(family=family, **overrides)
    theirs, ids = load_quantized(path, quantized), prompt(60, 384)
    local = Local(path, cuts=(1,))
    logits = local.step([local.row()], [ids])
    assert relative(logits, reference_logits(theirs, ids)) < TOLERANCES[quantized]


def test_bfloat16(tiny_checkpoint: MakeCheckpoint, quantized: str) -> None:
    """Not further from float32 than 1.25 times what transformers in bfloat16 is."""
    path, ids = tiny_checkpoint(**WIDE), prompt(80, 384)
    exact = reference_logits(load_quantized(path, quantized), ids)
    theirs = reference_logits(load_quantized(path, quantized, "bfloat16"), ids)
    local = Local(path, cuts=(2,), dtype="bfloat16")
    ours = local.step([local.row()], [ids])
    assert 0 < relative(ours, exact) < 1.25 * relative(theirs, exact)


CASES = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(("family", "shape"), CASES, ids=[f"{f}: {s}" for f, s in CASES])
def test_sizes_are_known_before(tiny_checkpoint: MakeCheckpoint, family: str, shape: str) -> None:
    """Of every block of every family; but for Gemma's norms, which stay float32, to the byte."""
    path = tiny_checkpoint(family=family, **SHAPES[family][shape])
    config = open_checkpoint(str(path)).config
    for dtype, quant in product(("float32", "bfloat16"), QUANTS):
        for index in range(config.num_blocks):
            parts = TorchParts(getattr(torch, dtype), CPU, quant)
            family_of(config).block(parts, config, index)
            predicted = block_bytes(config, index, DTYPES[dtype], quant)
            exact = dtype == "float32" or not family.startswith("gemma")
            assert predicted == pytest.approx(parts.nbytes, rel=0 if exact else 0.04)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama of 16 blocks of 13 MB."""
    path = tmp_path_factory.mktemp("large")
    raw = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 64}
    raw |= {"num_hidden_layers": 16, "intermediate_size": 1536, "num_key_value_heads": 4}
    (path / "config.json").write_text(json.dumps(raw))
    shapes = {name: spec.shape for name, spec in expected_layout(read_config(raw)).items()}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, path / SINGLE)
    return path


MEASURE = """
import json, sys, torch
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span
torch.set_num_threads(1)
def resident(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024
assert "bitsandbytes" not in sys.modules, "slow to import, and rarely needed"
checkpoint = open_checkpoint(".")
load_block_span(checkpoint, 0, 1, quant=sys.argv[1])  # imports
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS:")
span = load_block_span(checkpoint, 0, 16, quant=sys.argv[1])
print(json.dumps([resident("VmHWM:") - before, resident("VmRSS:") - before, span.param_bytes]))
"""


def test_memory_is_what_was_predicted(large: Path, quant: str) -> None:
    """Within 10 % when loaded; until then, a block as the file has it and some scratch on top."""
    verb = [sys.executable, "-c", MEASURE, quant]
    # What is freed goes back at once, so that what is counted is what is held.
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(verb, cwd=large, env=environ, check=True, capture_output=True, text=True)
    peak, held, counted = json.loads(ran.stdout)
    config = open_checkpoint(str(large)).config
    predicted = 16 * block_bytes(config, 0, 4, quant)
    assert counted == predicted
    assert held == pytest.approx(predicted, rel=0.1)
    scratch = 20 * quantize.SLICE_NUMBERS
    assert predicted < peak < predicted + block_bytes(config, 0, 4) + scratch


class Counting(Checkpoint):
    """Notes which blocks are read."""

    read: list[int]

    def block_tensors(self, index: int) -> Any:
        self.read.append(index)
        return super().block_tensors(index)


def test_a_move_keeps_what_overlaps(tiny_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    checkpoint.__class__ = Counting
    assert isinstance(checkpoint, Counting)
    checkpoint.read = []
    old = load_block_span(checkpoint, 0, 3, quant="nf4")
    new = load_block_span(checkpoint, 1, 4, quant="nf4", keep=old)
    assert checkpoint.read == [0, 1, 2, 3]
    assert new.loaded(1) is old.loaded(1)
    assert new.loaded(2) is old.loaded(2)
    other = load_block_span(checkpoint, 1, 3, quant="nf4", dtype="bfloat16", keep=new)
    assert checkpoint.read == [0, 1, 2, 3, 1, 2], "other dtypes cannot be kept"
    assert other.dtype == torch.bfloat16


def test_what_stays_dense(tiny_checkpoint: MakeCheckpoint) -> None:
    """Routers, by request."""
    parts = TorchParts(torch.float32, CPU, "int8")
    assert isinstance(parts.linear("gate", 8, 64, dense=True), weights.Linear)
    up = parts.linear("up", 8, 64)
    assert isinstance(up, AdaptedLinear)
    assert isinstance(up.layer, quantize.Int8Linear)


def test_numbers_that_are_none() -> None:
    for quant, bad in (("int8", float("nan")), ("nf4", float("inf")), ("int8", 1e6)):
        layer = quantized_linear(2, 64, None, torch.float32, CPU, quant)
        assert layer is not None
        rows = torch.ones(2, 64)
        rows[1, 3] = bad
        with pytest.raises(ModelError, match=f"no finite numbers in {quant}"):
            layer.fill(0, rows)


def test_what_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for quant in QUANTS:
        check_quant(quant, CPU)
        check_quant(quant, torch.device("cuda"))
    with pytest.raises(UsageError, match=r"no quantization 'int4'.*none, int8, nf4"):
        check_quant("int4", CPU)
    check_quant("none", torch.device("mps"))
    with pytest.raises(UsageError, match="does not run on the device mps"):
        check_quant("int8", torch.device("mps"))
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    check_quant("none", CPU)
    with pytest.raises(UsageError, match=r"bitsandbytes, which is not installed.*pip install"):
        check_quant("nf4", CPU)
