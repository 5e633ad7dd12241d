"""The bundled model on text that it was not trained on, its blocks in each form.

    python -m benchmarks.perplexity FORM [--windows N]
    python -m benchmarks.perplexity FORM --memory CHECKPOINT
    python -m benchmarks.perplexity FORM --speed CHECKPOINT

FORM is a dtype or a quantization (with float32 for the rest). Prints one JSON object: perplexity
and sizes; or what the blocks of any checkpoint take in a process, and their speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.layout import block_layout
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.memory import block_bytes
from petalnode.models.span import RowSlice, Span
from petalnode.serving.memory_plan import DTYPE_BYTES
from petalnode.serving.service import measure_throughput

FORMS = {
    "float32": {"dtype": "float32", "quant": "none"},
    "bfloat16": {"dtype": "bfloat16", "quant": "none"},
    "int8": {"dtype": "float32", "quant": "int8"},
    "nf4": {"dtype": "float32", "quant": "nf4"},
}
WINDOW, ROWS = 512, 4
BOS, EOS = 0, 1


def held_out_text() -> list[str]:
    """The files of this Python's standard library that training left out: 8 of 256 name hashes.

    The rule of `examples/train_demo_model.py`, without the exceptions that it makes for tables.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        kept = not skipped.intersection(name.split("/")) and not name.startswith("_sysconfigdata")
        if kept and hashlib.sha256(name.encode()).digest()[0] < 8:
            texts.append(path.read_text(encoding="utf-8", errors="ignore").expandtabs(8))
    return texts


def held_out_windows(checkpoint: Checkpoint, most: int | None) -> list[list[int]]:
    """Windows of tokens without overlap, each behind a first token."""
    tokenizer = checkpoint.tokenizer()
    ids = [one for text in held_out_text() for one in [*tokenizer.encode(text), EOS]]
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)[:most]
    return [[BOS, *ids[start : start + WINDOW]] for start in starts]


def nats_per_token(
    checkpoint: Checkpoint, span: Span, dtype: str, windows: Sequence[Sequence[int]]
) -> float:
    """The mean of -log p of every token but the first of each window."""
    client, total = load_client(checkpoint, dtype=dtype), 0.0
    for at in range(0, len(windows), ROWS):
        some = torch.tensor(windows[at : at + ROWS])
        given, wanted = some[:, :-1].flatten(), some[:, 1:].flatten()
        rows = [RowSlice(span.new_row(0, span.end), 0, WINDOW) for _ in some]
        hidden = client.embed(given, torch.arange(WINDOW).repeat(len(some)))
        logits = client.logits(span.forward(hidden, rows, 0, span.end))
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total / (len(windows) * WINDOW)


def perplexity(form: str, most: int | None) -> dict[str, Any]:
    """Perplexity, and bytes a parameter: of the blocks, and of the model with its embeddings."""
    checkpoint = open_checkpoint("demo")
    config, windows = checkpoint.config, held_out_windows(checkpoint, most)
    span = load_block_span(checkpoint, 0, config.num_blocks, **FORMS[form])
    dtype = FORMS[form]["dtype"]
    nats = nats_per_token(checkpoint, span, dtype, windows)
    layouts = [block_layout(config, index) for index in range(config.num_blocks)]
    in_blocks = sum(spec.numel for layout in layouts for spec in layout.values())
    client = load_client(checkpoint, dtype=dtype).param_bytes
    outside = config.vocab_size * config.hidden_size + config.hidden_size
    return {
        "tokens": len(windows) * WINDOW,
        "nats": nats,
        "perplexity": math.exp(nats),
        "block_bytes_per_parameter": span.param_bytes / in_blocks,
        "bytes_per_parameter": (span.param_bytes + client) / (in_blocks + outside),
    }


def memory(form: str, path: str) -> dict[str, Any]:
    """Bytes: predicted, held by the process, and at the peak beyond what it had before."""
    checkpoint = open_checkpoint(path)
    blocks = checkpoint.config.num_blocks
    load_block_span(checkpoint, 0, 1, **FORMS[form])  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS:")
    span = load_block_span(checkpoint, 0, blocks, **FORMS[form])
    held, peak = resident("VmRSS:") - before, resident("VmHWM:") - before
    size, quant = span.dtype.itemsize, FORMS[form]["quant"]
    each = [block_bytes(checkpoint.config, index, size, quant) for index in range(blocks)]
    dense = block_bytes(checkpoint.config, 0, DTYPE_BYTES[checkpoint.config.dtype])
    return {"predicted": sum(each), "held": held, "peak": peak, "dense_block": dense}


def speed(form: str, path: str) -> dict[str, Any]:
    """Seconds to load all blocks, and tokens/s through them: one row, and 64 tokens at once."""
    checkpoint = open_checkpoint(path)
    load_block_span(checkpoint, 0, 1, **FORMS[form])  # imports
    started = time.perf_counter()
    span = load_block_span(checkpoint, 0, checkpoint.config.num_blocks, **FORMS[form])
    seconds = time.perf_counter() - started
    measured = measure_throughput(span, time.perf_counter)
    return {"seconds": seconds, "decode": measured.decode, "forward": measured.forward}


def resident(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024


def main() -> None:
    """Parse the flags and print one object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--windows", type=int, help="how many of the windows (default: all)")
    parser.add_argument("--memory", metavar="CHECKPOINT", help="sizes instead, of a directory")
    parser.add_argument("--speed", metavar="CHECKPOINT", help="speed instead, of a directory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(memory(arguments.form, arguments.memory)))
    elif arguments.speed:
        print(json.dumps(speed(arguments.form, arguments.speed)))
    else:
        print(json.dumps(perplexity(arguments.form, arguments.windows)))


if __name__ == "__main__":
    main()
