"""One trainer in a process of its own, told what to do on stdin, answering on stdout.

python -m benchmarks.trainers local|swarm MODEL [--join INVITE]

{"do": "ready"}                                       → {}, once it is
{"do": WORK, "rows": n, "tokens": n}                  → {"s": …}
{"do": "flood", "rows": n, "tokens": n, "seconds": s} → {"batches": …}, forward and backward

WORK is ``forward`` without a graph, ``both``: forward and the gradient of the input, weights frozen
and no activation kept between the blocks' passes but their inputs, or, local alone, ``pieces``: the
same for as many rows at a time as a micro-batch of petalnode's has, ``keeping``: the same with all
activations kept.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import trio

from petalnode.node import NodeOptions, open_node
from petalnode.training.batches import Micro, cut
from petalnode.training.session import TrainingSession


class Trainer(Protocol):
    """Hidden states [rows * tokens, H] through all blocks."""

    hidden_size: int

    async def work(self, kind: str, hidden: torch.Tensor, lengths: list[int]) -> None:
        """Do one WORK."""


class Local:
    """transformers, in one process."""

    def __init__(self, model: Path) -> None:
        from transformers import LlamaModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._model = LlamaModel.from_pretrained(model, dtype=torch.float32)
        self._model.requires_grad_(False)
        self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self.hidden_size: int = self._model.config.hidden_size

    async def work(self, kind: str, hidden: torch.Tensor, lengths: list[int]) -> None:
        """See ``Trainer``. What is kept is what training mode says."""
        self._model.train(kind in ("both", "pieces"))
        micros = cut(lengths) if kind == "pieces" else [Micro(0, tuple(lengths))]
        for micro in micros:
            batch = micro.of(hidden).view(len(micro.lengths), -1, self.hidden_size)
            self._pass(kind, batch.requires_grad_(kind != "forward"))

    def _pass(self, kind: str, batch: torch.Tensor) -> None:
        with torch.set_grad_enabled(kind != "forward"):
            output = self._model(inputs_embeds=batch, use_cache=False).last_hidden_state
        if kind != "forward":
            output.backward(torch.ones_like(output))


class OverSwarm:
    """A training session of ``petalnode``."""

    def __init__(self, training: TrainingSession, hidden_size: int) -> None:
        self._training, self.hidden_size = training, hidden_size

    async def work(self, kind: str, hidden: torch.Tensor, lengths: list[int]) -> None:
        """See ``Trainer``."""
        back = kind != "forward"
        output, record = await self._training.forward(hidden, lengths, backward=back)
        if back:
            await self._training.backward(record, torch.ones_like(output))


@asynccontextmanager
async def open_trainer(arguments: argparse.Namespace) -> AsyncIterator[Trainer]:
    """The one that was asked for."""
    if arguments.trainer == "local":
        yield Local(Path(arguments.model))
        return
    options = NodeOptions(join=(arguments.join,))
    async with open_node(arguments.model, options) as node, node.open_training() as training:
        yield OverSwarm(training, node.checkpoint.config.hidden_size)


async def obey(trainer: Trainer, order: dict[str, Any]) -> dict[str, Any]:
    """Do one thing and say how it went."""
    if order["do"] == "ready":
        return {}
    rows, tokens = order["rows"], order["tokens"]
    drawn = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows * tokens, trainer.hidden_size, generator=drawn)
    started, batches = time.monotonic(), 0
    if order["do"] != "flood":
        await trainer.work(order["do"], hidden, [tokens] * rows)
        return {"s": time.monotonic() - started}
    while time.monotonic() - started < order["seconds"]:
        await trainer.work("both", hidden, [tokens] * rows)
        batches += 1
    return {"batches": batches}


async def work(arguments: argparse.Namespace) -> None:
    """Until stdin ends."""
    async with open_trainer(arguments) as trainer:
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps(await obey(trainer, json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trainer", choices=("local", "swarm"))
    parser.add_argument("model")
    parser.add_argument("--join")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its processes itself
    trio.run(work, arguments)


if __name__ == "__main__":
    main()
