"""Random schedules of deaths, power cuts, partitions and returns; the tokens are transformers'."""

from contextlib import suppress
from random import Random

import pytest
import trio

from petalnode.errors import PeerUnreachable

from .scene import LONG, SEEDS, SHORT, TWICE, checkpoint, expected, open_scene, path

__all__ = ["checkpoint", "expected", "path"]

STRIKES = 25


async def random_schedule(checkpoint, seed: int) -> tuple[list[int], int]:
    """Kills, power cuts, partitions, returns; at any moment, of anybody. Each block keeps one."""
    rng = Random(seed)
    async with open_scene(checkpoint, seed, latency_s=0.01, jitter_s=0.005) as scene:
        world, down = scene.world, set()

        def strike() -> None:
            place = rng.randrange(4)
            name = rng.choice(("", "2"))
            victim = "abcd"[place] + name
            if victim in down or {"abcd"[place], "abcd"[place] + "2"} - {victim} <= down:
                return
            kind = rng.choice(("kill", "kill", "silent", "part", "slow"))
            if kind == "part":
                other = rng.choice([n for n in TWICE if n != victim])
                world.partition(victim, other, oneway=rng.random() < 0.5, for_s=rng.uniform(1, 20))
            elif kind == "slow":
                world.slow_down(victim, rng.choice((1.0, 20.0, 500.0)))
            else:
                down.add(victim)
                world.kill(victim, silent=kind == "silent")
                scene.nursery.start_soon(come_back, victim, rng.uniform(0.5, 15))

        async def come_back(name: str, after_s: float) -> None:
            while name in down:
                await trio.sleep(after_s)
                with suppress(PeerUnreachable):  # its contact is down, too
                    await world.restart(name)
                    down.discard(name)

        async def strike_all() -> None:
            for _ in range(STRIKES):
                await trio.sleep(rng.expovariate(1.0))
                strike()
            for name in TWICE:
                world.slow_down(name, 1.0)

        length = rng.choice((SHORT, LONG))
        with trio.CancelScope() as striking:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(strike_all)
                await scene.generate(lambda n: strike() if rng.random() < 0.2 else None, length)
                striking.cancel()
        with trio.move_on_after(40):
            while scene.left_over():  # noqa: ASYNC110 - of several nodes
                await trio.sleep(1)
        return scene.tokens, length


@pytest.mark.parametrize("seed", range(6 * len(SEEDS)))
async def test_random_schedules(checkpoint, expected, autojump_clock, seed):
    tokens, length = await random_schedule(checkpoint, seed)
    assert tokens == expected[length]
