"""A busy simulated hour in small, for the tests of repeatability; prints its digest.

python chaos.py CHECKPOINT SEED
"""

import sys

import trio

from petalnode.errors import PetalnodeError
from petalnode.node import Node
from petalnode.session.session import GenerateOptions
from petalnode.simnet.clock import run_virtual
from petalnode.simnet.world import World, open_world

SPANS = {"a": (0, 2), "b": (2, 4), "c": (0, 4), "d": (1, 3), "e": (0, 2), "f": (2, 4), "g": (0, 1)}


async def chaos(checkpoint: str, seed: int) -> tuple[str, list[int]]:
    """Loss, jitter, two deaths, a partition, a return; what the network saw, and what was said."""
    said: list[int] = []
    async with open_world(seed, checkpoint, latency_s=0.02, jitter_s=0.02, loss=0.02) as world:
        for name, blocks in SPANS.items():
            await world.start(name, blocks=blocks)
        client = await world.start("client")
        now = trio.current_time()
        world.at(now + 2, lambda: world.kill("c"))
        world.at(now + 4, lambda: world.kill("d", silent=True))
        world.at(now + 5, lambda: world.partition("a", "b", oneway=True, for_s=4))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, client, said)
            await trio.sleep(7)
            await world.restart("c")
            await trio.sleep(5)
        return world.digest, said


async def talk(client: Node, said: list[int]) -> None:
    """Generate again and again, whatever happens to the nodes."""
    for round_number in range(6):
        try:
            async with client.open_session() as session:
                options = GenerateOptions(max_new_tokens=5)
                said += [t.id async for t in session.generate([5, round_number], options)]
        except PetalnodeError:
            said.append(-1)
        await trio.sleep(1)


__all__ = ["World", "chaos"]

if __name__ == "__main__":
    path, number = sys.argv[1], int(sys.argv[2])
    print(*run_virtual(lambda: chaos(path, number), number))
