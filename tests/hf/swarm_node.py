"""A node for these tests: real hops over memory streams, and training by local passes."""

from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from petalnode.blocking import Held, LoopThread
from petalnode.hf import PetalnodeForCausalLM
from petalnode.hf.model import read_config
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.options import NodeOptions
from petalnode.session.hidden import HiddenSession
from petalnode.session.session import check_rows

from ..node.memory_swarm import open_memory_swarm


@dataclass(eq=False)
class Record:
    """What backward needs of a forward."""

    x: torch.Tensor
    lengths: Sequence[int]
    tuning: Tuning
    hidden_states: list[torch.Tensor]


class LocalTraining:
    """What ``Node.open_training`` gives, over a span in this process."""

    def __init__(self, checkpoint):
        self.span = load_block_span(checkpoint, 0, checkpoint.config.num_blocks, dtype="float32")
        self.backwards = 0

    async def forward(self, hidden, lengths, *, tuning=NOTHING, keep_blocks=False, backward=True):
        passing = ForwardPass(self.span, 0, self.span.end, hidden, lengths, tuning)
        states = [hidden]
        while passing.steps_left:
            passing.step()
            states.append(passing.output)
        return passing.output, Record(hidden, lengths, tuning, states if keep_blocks else [])

    async def backward(self, record, grad):
        self.backwards += 1
        span, args = self.span, (record.x, record.lengths, record.tuning)
        passing = BackwardPass(ForwardPass(span, 0, span.end, *args, keep=True), grad)
        while passing.steps_left:
            passing.step()
        return passing.grad, passing.tuning_grads


class SwarmNode:
    """As much of a ``Node`` as the models of ``petalnode.hf`` use, over two hops."""

    def __init__(self, checkpoint, swarm):
        self.checkpoint, self.swarm = checkpoint, swarm
        self.options = NodeOptions(dtype="float32")
        half = checkpoint.config.num_blocks // 2
        self.hops = [("a", 0, half), ("b", half, checkpoint.config.num_blocks)]
        for hop in self.hops:
            swarm.add(*hop)

    @asynccontextmanager
    async def open_hidden(self, start, end, report, workload, *, rows=1, tuning=NOTHING, served=""):
        check_rows(rows)
        self.asked = workload
        added = {"tuning": tuning, "adapter": served}
        async with self.swarm.chain(*self.hops, rows=rows, **added) as chain:
            yield HiddenSession(chain, torch.float32, self.checkpoint.config.max_positions)

    @asynccontextmanager
    async def open_training(self, report):
        yield LocalTraining(self.checkpoint)


@asynccontextmanager
async def swarm_node(path):
    async with open_memory_swarm(path) as swarm:
        yield SwarmNode(open_checkpoint(str(path)), swarm)


def open_swarm_node(path):
    """Such a node in a background thread."""
    thread = LoopThread()
    node = Held(thread, swarm_node(path), root=True)
    thread.start(node)
    return node


def model_on(node, kind=PetalnodeForCausalLM, **changes):
    """A model of ``petalnode.hf`` over such a node."""
    return kind(read_config(node.value.checkpoint.name, changes), node).eval()
