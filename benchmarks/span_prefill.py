"""How long a prefill of a span takes, compute alone: what a stall contains without any fault.

    python -m benchmarks.span_prefill MODEL

{"blocks": [start, end], "tokens": n} → {"s": …}, in chunks as large as a frame, one thread.
"""

from __future__ import annotations

import json
import signal
import sys
import time

import torch

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span
from petalnode.models.span import RowSlice, Span
from petalnode.protocol import MAX_STEP_TOKENS


def prefill(span: Span, start: int, end: int, tokens: int) -> float:
    """Seconds for ``tokens`` through blocks [start, end) with an empty cache."""
    row = span.new_row(start, end)
    hidden = torch.randn(tokens, span.config.hidden_size, generator=torch.Generator())
    started = time.monotonic()
    for position in range(0, tokens, MAX_STEP_TOKENS):
        part = hidden[position : position + MAX_STEP_TOKENS]
        span.forward(part, [RowSlice(row, position, len(part))], start, end)
    return time.monotonic() - started


def main() -> None:
    checkpoint = open_checkpoint(sys.argv[1])
    blocks = checkpoint.config.num_blocks
    span = load_block_span(checkpoint, 0, blocks, dtype=torch.float32, device=torch.device("cpu"))
    for line in sys.stdin:
        order = json.loads(line)
        start, end = order["blocks"]
        print(json.dumps({"s": prefill(span, start, end, order["tokens"])}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its processes itself
    main()
