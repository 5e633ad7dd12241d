"""A swarm of real nodes on a virtual network, its client, and what is done to them.

Tests that import the fixtures get a tiny model, and what transformers makes of its two prompts.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import torch
import trio

from petalnode.errors import PeerError
from petalnode.events import Recovered, Route
from petalnode.models.checkpoint import open_checkpoint
from petalnode.node import Node
from petalnode.nurseries import plain_errors
from petalnode.session.session import GenerateOptions, Session
from petalnode.simnet.compute import Cost
from petalnode.simnet.world import KV_TOKENS, World, open_world

from ..models.reference import load_reference, reference_generate

ONCE = {"a": (0, 1), "b": (1, 2), "c": (2, 3), "d": (3, 4)}
TWICE = {**ONCE, "a2": (0, 1), "b2": (1, 2), "c2": (2, 3), "d2": (3, 4)}
NEW = 16
SHORT, LONG = 20, 400
COST = Cost(block_s=0.002, token_s=0.0001)
LIMIT_S = 900.0
FREED_WITHIN_S = 1.0
STALL_S = 8.0  # keepalive notices silence within 6 s; a replay and a round trip come after it
SEEDS = range(int(os.environ.get("PETALNODE_TEST_SEEDS", "1")))
Disturb = Callable[[], Awaitable[None] | None]


@pytest.fixture(scope="module")
def path(tiny_checkpoint):
    return tiny_checkpoint(eos_token_id=None)


@pytest.fixture(scope="module")
def checkpoint(path):
    return open_checkpoint(str(path))


@pytest.fixture(scope="module")
def expected(path):
    torch.set_num_threads(1)
    reference = load_reference(path)
    return {n: reference_generate(reference, prompt(n), NEW) for n in (SHORT, LONG)}


def prompt(length: int) -> list[int]:
    return [(7 * n + n * n) % 300 for n in range(length)]


async def once(result: Awaitable[None] | None) -> None:
    if result is not None:
        await result


class Scene:
    """A world with its serving nodes, a client, and what is told to the client."""

    def __init__(self, world: World, client: Node, nursery: trio.Nursery) -> None:
        self.world, self.client, self.nursery = world, client, nursery
        self.events: list[object] = []
        self.blamed: set[str] = set()
        self.session: Session | None = None
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        note = client.swarm.health.note

        def watched(error: PeerError, now: float) -> bool:
            if note(error, now):
                self.blamed.add(world.name_of(error.peer_id))
                return True
            return False

        client.swarm.health.note = watched

    def hop(self, index: int) -> str:
        """The name of a hop of the chain as it is now."""
        return self.world.name_of(self.session.chain.hops[index].peer_id)

    @property
    def recovered(self) -> list[Recovered]:
        return [event for event in self.events if isinstance(event, Recovered)]

    @property
    def lost(self) -> set[str]:
        return {self.world.name_of(peer) for event in self.recovered for peer in event.lost}

    @property
    def route(self) -> list[str]:
        """The chain as it was told last."""
        last = [event for event in self.events if isinstance(event, Route)][-1]
        return [self.world.name_of(hop.peer_id) for hop in last.hops]

    async def generate(
        self, disturb: Callable[[int], Awaitable[None] | None], length: int = SHORT
    ) -> None:
        """A whole session; ``disturb(n)`` is called after the n-th token, and before any with 0."""
        async with self.client.open_session(self.events.append) as self.session:
            await once(disturb(0))
            async for token in self.session.generate(prompt(length), GenerateOptions(NEW)):
                self.tokens.append(token.id)
                self.seconds.append(token.ms / 1000)
                await once(disturb(len(self.tokens)))

    def left_over(self) -> list[str]:
        """What nodes that live still hold of sessions."""
        found = []
        for member in self.world._members.values():
            if member.node is None or member.node.service is None:
                continue
            service = member.node.service
            kv_tokens = member.options.kv_tokens or KV_TOKENS
            if service.server.sessions or service.budget.tokens_free != kv_tokens:
                found.append(member.name)
            if service.server.log_tokens:
                found.append(f"{member.name}'s log")
        return found


@asynccontextmanager
async def open_scene(
    checkpoint, seed: int, spans=TWICE, *, small=(), **links: float
) -> AsyncIterator[Scene]:
    """Leaving it checks that every node that lives has freed everything soon."""
    links.setdefault("latency_s", 0.01)
    with plain_errors(), trio.fail_after(LIMIT_S):
        async with open_world(seed, checkpoint, cost=COST, **links) as world:
            for name, blocks in spans.items():
                more = {"kv_tokens": 64} if name in small else {}
                await world.start(name, blocks=blocks, **more)
            client = await world.start("client")
            async with trio.open_nursery() as nursery:
                scene = Scene(world, client, nursery)
                yield scene
                await trio.sleep(FREED_WITHIN_S)
                assert scene.left_over() == []
                nursery.cancel_scope.cancel()


def at(count: int, action: Disturb) -> Callable[[int], Awaitable[None] | None]:
    """Disturb once, after that token."""
    return lambda n: action() if n == count else None
