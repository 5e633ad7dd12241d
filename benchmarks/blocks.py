"""One process, one thread: petalnode's blocks against local transformers, float32.

Prints ms of CPU time a decode step and a prefill, medians of interleaved runs, for a tiny Llama (8
blocks of hidden 256) and one of 246 million parameters (16 blocks of hidden 1024), random weights;
then what a decode step costs when several rows share it. CPU time, because one thread that never
waits takes just that, and because neighbours on a shared machine disturb it less than the clock.

    python benchmarks/blocks.py [--quick] [--only tiny|246M]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from petalnode.models.client import ClientParts
from petalnode.models.families import read_config
from petalnode.models.families.llama import llama_block, llama_client
from petalnode.models.layers.weights import TorchParts
from petalnode.models.layout import block_prefix
from petalnode.models.span import LoadedBlock, RowSlice, Span

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 2048},
    "246M": {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "intermediate_size": 2816, "vocab_size": 32000},
}
PREFIXES, PREFILLS, ROWS = (128, 1024), (256, 1024), (1, 2, 4, 8, 16)
Step = Callable[[], object]


class Ours:
    """The same weights in petalnode's blocks."""

    def __init__(self, reference: Any) -> None:
        cpu = torch.device("cpu")
        config = read_config(reference.config.to_dict())
        weights = reference.state_dict()
        blocks = []
        for index in range(config.num_blocks):
            parts = TorchParts(torch.float32, cpu)
            block = llama_block(parts, config, index)
            for name, fill in parts.targets.items():
                fill(weights[block_prefix(config, index) + name])
            blocks.append(LoadedBlock(block, parts.nbytes))
        self.span = Span(config, 0, blocks, torch.float32, cpu)
        parts = TorchParts(torch.float32, cpu)
        client = llama_client(parts, config)
        for name, fill in parts.targets.items():
            fill(weights[name])
        self.client = ClientParts(config, client, parts, torch.float32)

    def rows(self, count: int, prefix: int) -> list[Any]:
        """Return rows with `prefix` tokens each."""
        rows = [self.span.new_row(0, self.span.end) for _ in range(count)]
        for row in rows:
            if prefix:
                self.step([row], prefix)
        return rows

    def step(self, rows: Sequence[Any], n: int) -> Tensor:
        """Append n tokens to each row; return the last logits."""
        ids = torch.ones(len(rows) * n, dtype=torch.int64)
        x = self.client.embed(ids, torch.zeros_like(ids))
        slices = [RowSlice(row, row.length, n) for row in rows]
        return self.client.logits(self.span.forward(x, slices, 0, self.span.end)[-1:])


@torch.inference_mode()
def theirs_step(model: Any, cache: Any, n: int) -> Any:
    """Append n tokens with transformers; return its cache."""
    ids = torch.ones((1, n), dtype=torch.int64)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.past_key_values


def interleaved_ms(steps: Sequence[Step], times: int) -> list[float]:
    """Return the median ms of each step; they take turns, so that they share the noise."""
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(times + 1):
        for step, samples in zip(steps, taken, strict=True):
            begin = time.thread_time()
            step()
            if turn:  # the first turn warms up
                samples.append((time.thread_time() - begin) * 1e3)
    return [statistics.median(samples) for samples in taken]


def report(what: str, ours: float, theirs: float) -> None:
    """Print one line of the comparison."""
    both = f"petalnode {ours:8.2f} ms   transformers {theirs:8.2f} ms"
    print(f"{what:28} {both}   {ours / theirs:.2f} x")


def compare(name: str, model: Any, ours: Ours, times: int) -> None:
    """Print decode and prefill against transformers."""
    for prefix in PREFIXES:
        rows = ours.rows(1, prefix)
        cache = theirs_step(model, None, prefix)
        pair = [lambda r=rows: ours.step(r, 1), lambda c=cache: theirs_step(model, c, 1)]
        report(f"{name} decode at {prefix}", *interleaved_ms(pair, times))
    for n in PREFILLS:
        pair = [lambda n=n: ours.rows(1, n), lambda n=n: theirs_step(model, None, n)]
        report(f"{name} prefill of {n}", *interleaved_ms(pair, max(3, times // 8)))


def compare_rows(name: str, ours: Ours, times: int) -> None:
    """Print a decode step's cost for batches of rows at the first prefix."""
    batches = [ours.rows(count, PREFIXES[0]) for count in ROWS]
    steps = [lambda rows=rows: ours.step(rows, 1) for rows in batches]
    medians = interleaved_ms(steps, times)
    for count, ms in zip(ROWS, medians, strict=True):
        gain = count * medians[0] / ms
        print(f"{name} decode, {count:2} rows {ms:17.2f} ms   {gain:.2f} x the tokens of one row")


def main() -> None:
    """Parse the flags and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--only", choices=sorted(SIZES), help="one size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, sizes in SIZES.items():
        if args.only in (None, name):
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192)).eval()
            ours = Ours(model)
            times = (12 if args.quick else 40) * (4 if name == "tiny" else 1)
            compare(name, model, ours, times)
            compare_rows(name, ours, times)


if __name__ == "__main__":
    main()
