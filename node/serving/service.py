"""What a node serves: its span, the engine that computes it, and the servers in front of it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import trio

from petalnode.compute import Compute
from petalnode.events import Downloading, Loading, Report
from petalnode.models.checkpoint import Checkpoint
from petalnode.models.devices import free_bytes
from petalnode.models.host_memory import available_bytes
from petalnode.models.loading import load_block_span
from petalnode.models.span import RowSlice, Span
from petalnode.serving.budget import KvBudget
from petalnode.serving.engine import SpanEngine
from petalnode.serving.hop_session import Connect
from petalnode.serving.kept import MAX_AHEAD_BYTES, MAX_KEPT_BYTES, KeptPasses
from petalnode.serving.memory_plan import FreeMemory
from petalnode.serving.server import DEFAULT_LOG_TOKENS, HopServer
from petalnode.serving.session_tuning import MAX_NODE_TUNING_BYTES, TuningBudget
from petalnode.serving.training import TrainServer
from petalnode.training.protocol import MAX_MICRO_TOKENS

KV_SHARE = 0.5
"""Of what is free after loading, for attention caches when ``--kv-tokens`` is not given."""
MAX_KV_TOKENS = 1 << 20
GRAPH_SHARE = 0.25
"""Of what is free after loading, for the one training job that is computed."""
KEPT_SHARE = 0.125
"""Of what is free after loading, for forward passes whose backward may come; never more than
``MAX_KEPT_BYTES``."""
AHEAD_SHARE = 0.03125
"""Of what is free after loading, for activations computed ahead; never more than
``MAX_AHEAD_BYTES``."""
TUNING_SHARE = 0.0625
"""Of what is free after loading, for what clients add to the blocks; never more than
``MAX_NODE_TUNING_BYTES``."""
GRAPH_WIDTHS = 32
"""Numbers that autograd keeps of a token in a block, in hidden sizes: inputs of some ten layers, of
which the feed-forward's are several times as wide."""
MEASURED_TOKENS = 64
MEASURED_STEPS = 5
FALLBACK_TPS = 1.0
"""Announced while a node still loads and has measured nothing."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Throughput:
    """Measured tokens/s of the whole span: one row at a time, and many tokens at once."""

    decode: float = FALLBACK_TPS
    forward: float = FALLBACK_TPS


@dataclass(frozen=True)
class SpanService:
    """A loaded span, ready to serve."""

    span: Span
    engine: SpanEngine
    server: HopServer
    training: TrainServer
    budget: KvBudget
    throughput: Throughput

    @property
    def sessions(self) -> int:
        """Open sessions, those that train included."""
        return self.server.sessions + self.training.sessions

    async def drain(self) -> None:
        """Take no new sessions, and tell the clients of those here to move."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.server.drain)
            nursery.start_soon(self.training.drain)

    async def wait_idle(self) -> None:
        """Until no session is open."""
        await self.server.wait_idle()
        await self.training.wait_idle()

    def memory(self) -> Mapping[str, int]:
        """Bytes: of the span's weights, and the peak of the process so far."""
        return {"weights": self.span.param_bytes, "peak": peak_bytes()}


Measure = Callable[[Span], Throughput]
"""Finds out how fast a loaded span is."""


def peak_bytes() -> int:
    """The most memory that this process has had resident.

    Linux's ``VmHWM`` where there is one: ``ru_maxrss`` is inherited from the process before exec.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> FreeMemory:
    """What is really free now."""
    free = free_bytes(device)
    return FreeMemory(str(device), free, free if device.type == "cpu" else available_bytes())


async def load_service(
    checkpoint: Checkpoint,
    blocks: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quant: str,
    kv_tokens: int | None,
    replay_log_tokens: int | None,
    compute: Compute,
    connect: Connect,
    measure: Measure,
    report: Report,
    keep: Span | None = None,
) -> SpanService:
    """Load the blocks, measure them, and put engine and server around them.

    Replay logs keep ``replay_log_tokens`` hidden states, by default as many as ``kv_tokens``.
    Blocks that ``keep`` holds, a span loaded here before, are taken from there. Raises
    ``ModelError`` or ``UsageError``. Loading runs in the worker thread.
    """

    def progress(done: int, total: int) -> None:
        compute.tell(lambda: report(Loading(blocks, done, total)))

    def fetching(file: str, done: int, total: int) -> None:
        compute.tell(lambda: report(Downloading(file, done, total)))

    load = partial(load_block_span, checkpoint, *blocks, dtype=dtype, device=device, quant=quant)
    span = await compute.run(partial(load, keep=keep, progress=progress, fetching=fetching))
    throughput = await compute.run(partial(measure, span))
    tokens = kv_tokens or default_kv_tokens(span)
    budget = KvBudget(tokens, span.end - span.start)
    tunings = TuningBudget(default_tuning_bytes(device))
    kept = KeptPasses(default_kept_bytes(span), default_ahead_bytes(span))
    engine = SpanEngine(span, compute, kept)
    server = HopServer(
        engine,
        budget,
        compute=compute,
        fingerprint=checkpoint.fingerprint,
        connect=connect,
        log_budget=KvBudget(replay_log_tokens or min(tokens, DEFAULT_LOG_TOKENS), 1),
        tunings=tunings,
    )
    training = TrainServer(
        engine,
        compute,
        fingerprint=checkpoint.fingerprint,
        max_tokens=default_job_tokens(span),
        is_draining=lambda: server.draining,
        tunings=tunings,
        kept=kept,
    )
    return SpanService(span, engine, server, training, budget, throughput)


def default_kv_tokens(span: Span) -> int:
    """As many as fit a share of the memory that is free now, for the whole span."""
    per_token = span.kv_bytes_per_token * (span.end - span.start)
    fitting = int(free_bytes(span.device) * KV_SHARE) // per_token
    return max(1, min(fitting, MAX_KV_TOKENS))


def default_tuning_bytes(device: torch.device) -> int:
    """A share of the memory that is free now."""
    return min(int(free_bytes(device) * TUNING_SHARE), MAX_NODE_TUNING_BYTES)


def default_kept_bytes(span: Span) -> int:
    """A share of the memory that is free now."""
    return min(int(free_bytes(span.device) * KEPT_SHARE), MAX_KEPT_BYTES)


def default_ahead_bytes(span: Span) -> int:
    """A share of the memory that is free now."""
    return min(int(free_bytes(span.device) * AHEAD_SHARE), MAX_AHEAD_BYTES)


def default_job_tokens(span: Span) -> int:
    """Tokens of a training job that fits a share of the memory that is free now: the activations
    of one block at a time, and the inputs of all."""
    numbers = (GRAPH_WIDTHS + span.end - span.start) * span.config.hidden_size
    fitting = int(free_bytes(span.device) * GRAPH_SHARE) // (numbers * span.dtype.itemsize)
    return max(1, min(fitting, MAX_MICRO_TOKENS))


def measure_throughput(span: Span, clock: Clock) -> Throughput:
    """Time a few forward passes of random hidden states through the loaded blocks."""
    hidden = torch.randn(MEASURED_TOKENS, span.config.hidden_size)
    forward_s = [timed(span, hidden, clock) for _ in range(2)]
    decode_s = [timed(span, hidden[:1], clock) for _ in range(MEASURED_STEPS)]
    return Throughput(
        decode=1 / max(min(decode_s), 1e-6),
        forward=MEASURED_TOKENS / max(min(forward_s), 1e-6),
    )


def timed(span: Span, hidden: torch.Tensor, clock: Clock) -> float:
    """Seconds for one pass over an empty cache, the result brought to the CPU."""
    row = span.new_row(span.start, span.end)
    started = clock()
    span.forward(hidden, [RowSlice(row, 0, hidden.shape[0])], span.start, span.end).cpu()
    return clock() - started
