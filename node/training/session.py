"""Forward and backward through blocks that lie elsewhere: what a client trains with.

    async with node.open_training() as training:
        output, record = await training.forward(hidden, lengths, tuning)
        grad_in, grads = await training.backward(record, grad)

The client keeps, in the record, the input of every stage that a micro-batch went through. So a hop
that dies costs its stage alone: forward, it is computed by another; backward too, or, where nobody
else holds exactly these blocks, that stage goes forward once more through others, for its inner
boundaries. What comes out does not depend on the way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import torch
import trio

from petalnode.compute import Compute
from petalnode.errors import PeerRefused, UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.tuning.check import check_tuning
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.nurseries import plain_errors
from petalnode.training.batches import ONE_HOP, PIPELINE, Micro, OrderedSum, cut
from petalnode.training.crew import Crew, Held, NobodyHoldsAll, Work
from petalnode.training.inputs import check_blocks, check_gradient, check_hidden, row_lengths
from petalnode.training.line import Added
from petalnode.training.protocol import MAX_MICRO_TOKENS
from petalnode.training.spread import Stage

MAX_FLYING = 64
"""Micro-batches of one call that are on their way at once."""


@dataclass(frozen=True)
class Passed:
    """A stage that a micro-batch went through, what it went in with, x [T, H], and who kept it."""

    stage: Stage
    x: torch.Tensor
    held: Held | None


@dataclass(eq=False)
class Record:
    """What backward needs of one forward. It may be used any number of times, or dropped."""

    micros: Sequence[Micro]
    passed: list[list[Passed]]
    added: Added
    output: torch.Tensor
    crew: Crew
    """Through whom: versions of what is added are theirs."""

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...]:
        """With ``keep_blocks``: the inputs [T, H] of every block, and the output."""
        inputs = zip(*self.passed, strict=True)
        return (*(torch.cat([one.x for one in stage]) for stage in inputs), self.output)


@dataclass(frozen=True)
class Desk:
    """What of the node's own a training session works with."""

    config: ModelConfig
    compute: Compute


class TrainingSession:
    """Blocks ``[start, end)``. Made by ``Node.open_training``; any number of tasks may use it.

    ``compute`` is the node's thread, for what is computed here. No row may have more than
    ``max_row_tokens``.
    """

    def __init__(self, desk: Desk, span: Stage, crew: Crew) -> None:
        self.start, self.end = span
        self.compute = desk.compute
        self.crew = crew
        self.max_row_tokens = min(MAX_MICRO_TOKENS, desk.config.max_positions)
        self._config = desk.config
        self._added = Added()
        self._versions = 0

    async def forward(
        self,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        tuning: Tuning = NOTHING,
        *,
        keep_blocks: bool = False,
        backward: bool = True,
    ) -> tuple[torch.Tensor, Record]:
        """Outputs [T, H], on the CPU, for hidden states [T, H] of rows with these ``lengths``, one
        behind the other from position 0 on; and the record that ``backward`` takes.

        With ``keep_blocks`` the record has the hidden states between all blocks. Without
        ``backward`` the hops are told that none will follow, which saves them memory. Waits for
        peers, with a reason. Raises ``UsageError`` for what does not fit or is not finite, and
        ``NoRoute`` when nobody takes the work.
        """
        check_hidden(hidden, self._config.hidden_size)
        check_blocks(tuning, self._config)
        lengths = row_lengths(lengths, len(hidden), self.max_row_tokens)
        batch = wire_copy(hidden)
        added = await self._snapshot(tuning)
        call = _Call(added, len(batch), keep_blocks, keep=backward)
        if not keep_blocks:
            call.stages |= self.crew.plan((self.start, self.end), len(batch))
        micros = cut(lengths, ONE_HOP if self.crew.is_alone(call.stages) else PIPELINE)
        passed: list[list[Passed]] = [[] for _ in micros]
        outputs = [batch] * len(micros)

        async def one(number: int) -> None:
            micro = micros[number]
            way = await self._through((self.start, self.end), micro, micro.of(batch), call)
            passed[number], outputs[number] = way

        await each(one, len(micros))
        output = torch.cat(outputs).to(hidden.dtype)
        return output, Record(micros, passed, added, output, self.crew)

    async def backward(
        self, record: Record, grad: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients of the input [T, H] and, float32, of the tuning's tensors by their names, from
        that of the output [T, H]. Waits and raises as ``forward`` does."""
        if not isinstance(record, Record) or record.crew is not self.crew:
            raise UsageError(
                "There is no way back through this session without a record of its own.",
                "Give the record that its forward returned.",
            )
        check_gradient(grad, record.output)
        batch = wire_copy(grad)
        call, sums = _Call(record.added, len(batch)), OrderedSum()
        inputs = [batch] * len(record.micros)

        async def one(number: int) -> None:
            g = record.micros[number].of(batch)
            inputs[number], grads = await self._back(record, number, g, call)
            sums.add(number, grads)

        await each(one, len(record.micros))
        return torch.cat(inputs).to(grad.dtype), sums.total

    async def _through(
        self, span: Stage, micro: Micro, x: torch.Tensor, call: _Call
    ) -> tuple[list[Passed], torch.Tensor]:
        """One micro-batch forward through some blocks: its stages, and the output [T, H]."""
        passed: list[Passed] = []
        at, last = span
        while at < last:
            until = at + 1 if call.keep_blocks else last
            work = Work("forward", (at, until), micro.lengths, {"x": x}, call, keep=call.keep)
            done = await self.crew.do(work)
            passed.append(Passed((at, done.end), x, done.held if call.keep else None))
            x, at = done.tensors["x"], done.end
        return passed, x

    async def _back(
        self, record: Record, number: int, g: torch.Tensor, call: _Call
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One micro-batch backward: the gradient of its input, and those of the tuning."""
        micro, stages = record.micros[number], list(record.passed[number])
        grads: dict[str, torch.Tensor] = {}
        while stages:
            stage, x = stages[-1].stage, stages[-1].x
            inputs, held = {"x": x, "g": g}, stages[-1].held
            work = Work("backward", stage, micro.lengths, inputs, call, held=held)
            try:
                done = await self.crew.do(work)
            except NobodyHoldsAll:
                stages[-1:], _ = await self._through(stage, micro, x, call)
                continue
            stages.pop()
            g = done.tensors.pop("x")
            grads |= done.tensors
        return g, grads

    async def _snapshot(self, tuning: Tuning) -> Added:
        """The tuning as it is now, under a version of its own if it has changed."""
        tuning = tuning.within(self.start, self.end)
        if not tuning.blocks:
            return Added()
        known = self._added
        changed = await self.compute.run(lambda: self._changed(known.tuning, tuning))
        if changed is None:
            return known
        self._versions += 1
        self._added = added = Added(self._versions, changed)
        return added

    def _changed(self, known: Tuning, tuning: Tuning) -> Tuning | None:
        """A checked copy of a tuning that is not the known one. Runs in the worker thread."""
        if same_tuning(known, tuning):
            return None
        check_tuning(self._config, self.start, self.end, tuning)
        return tuning.map(lambda tensor: tensor.detach().cpu().clone())


@dataclass(eq=False)
class _Call:
    """What all work of one forward or backward has in common."""

    added: Added
    tokens: int
    keep_blocks: bool = False
    keep: bool = True
    """For what goes forward: a backward pass will follow."""
    stages: set[Stage] = field(default_factory=set)
    refused: dict[str, PeerRefused] = field(default_factory=dict)


def same_tuning(one: Tuning, other: Tuning) -> bool:
    """Whether they are the same numbers for the same sites."""
    scales = [
        {
            (i, site): pair.scale
            for i, block in t.blocks.items()
            for site, pair in block.lora.items()
        }
        for t in (one, other)
    ]
    mine, theirs = dict(one.named()), dict(other.named())
    return (
        scales[0] == scales[1]
        and mine.keys() == theirs.keys()
        and all(
            mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor.detach().cpu())
            for name, tensor in theirs.items()
        )
    )


async def each(task: Callable[[int], Awaitable[None]], count: int) -> None:
    """Run the task for every number below ``count``, the first ones first, few at once."""
    flying = trio.Semaphore(MAX_FLYING)

    async def one(number: int) -> None:
        try:
            await task(number)
        finally:
            flying.release()

    with plain_errors():
        async with trio.open_nursery() as nursery:
            for number in range(count):
                await flying.acquire()
                nursery.start_soon(one, number)


def wire_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The caller's numbers as they are sent: they may change while that lasts."""
    dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)
