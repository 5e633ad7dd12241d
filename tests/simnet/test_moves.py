"""Hops that are left before they die: slow ones, and those that say goodbye, in mid-session."""

import pytest
import trio

from petalnode.protocol import HOP_PROTOCOL
from petalnode.session.session import GenerateOptions

from .scene import LONG, NEW, SHORT, at, checkpoint, expected, once, open_scene, path, prompt

__all__ = ["checkpoint", "expected", "path"]


async def test_a_slow_hop_is_left(checkpoint, expected, autojump_clock):
    async with open_scene(checkpoint, 1) as scene:
        slow = []

        def slow_down() -> None:
            slow.append(scene.hop(2))
            scene.world.slow_down(slow[0], 200.0)

        async with scene.client.open_session(scene.events.append) as scene.session:
            options = GenerateOptions(60)
            async for token in scene.session.generate(prompt(SHORT), options):
                scene.tokens.append(token.id)
                scene.seconds.append(token.ms / 1000)
                at(10, slow_down)(len(scene.tokens))
            assert scene.hop(2) not in slow
        assert scene.tokens[:NEW] == expected[SHORT]
        assert scene.blamed == set()
        assert max(scene.seconds[40:]) < 0.1


@pytest.mark.parametrize("place", [0, 1, 3])
async def test_a_node_that_stops_is_left_while_it_serves(
    checkpoint, expected, autojump_clock, place
):
    async with open_scene(checkpoint, 1) as scene:
        world, stopped = scene.world, []

        def stop() -> None:
            stopped.append(scene.hop(place))
            scene.nursery.start_soon(leave, stopped[0])

        async def leave(name: str) -> None:
            await world._members[name].node.drain()
            stopped.append(trio.current_time())
            await world.stop(name)

        async with scene.client.open_session(scene.events.append) as scene.session:
            async for token in scene.session.generate(prompt(LONG), GenerateOptions(60)):
                scene.tokens.append(token.id)
                scene.seconds.append(token.ms / 1000)
                at(5, stop)(len(scene.tokens))
            assert len(stopped) == 2  # it left before the session ended
        assert scene.tokens[:NEW] == expected[LONG]
        assert scene.blamed == set()
        assert scene.recovered == []  # nothing was lost: it moved
        normal = sorted(scene.seconds[1:])[30]
        assert max(scene.seconds[1:]) < 1.5 * normal + 0.3


@pytest.mark.parametrize("place", [0, 2])
async def test_a_node_stops_in_the_middle_of_a_prompt(checkpoint, expected, autojump_clock, place):
    async with open_scene(checkpoint, 1, bandwidth=1e6) as scene:
        world, left = scene.world, []

        async def leave() -> None:
            name = scene.hop(place)
            await world._members[name].node.drain()
            left.append(name)
            await world.stop(name)

        def arrange() -> None:
            before = world.bytes_sent("client", scene.hop(0), HOP_PROTOCOL)

            def reached(parcel) -> bool:
                return world.bytes_sent("client", scene.hop(0), HOP_PROTOCOL) > before + 40_000

            world.when(reached, lambda parcel: scene.nursery.start_soon(leave))

        await scene.generate(at(0, arrange), LONG)
        assert scene.tokens == expected[LONG]
        assert scene.recovered == []
        assert left
        assert left[0] not in scene.route


@pytest.mark.parametrize("dead", [1, 3])
async def test_a_node_stops_while_another_is_replaced(checkpoint, expected, autojump_clock, dead):
    async with open_scene(checkpoint, 1) as scene:
        world, left, victims = scene.world, [], []

        async def leave(name: str) -> None:
            await world._members[name].node.drain()
            left.append(name)
            await world.stop(name)

        def both() -> None:
            victims.append(scene.hop(dead))
            scene.nursery.start_soon(leave, scene.hop(2))
            world.kill(victims[0])

        async with scene.client.open_session(scene.events.append) as scene.session:
            async for token in scene.session.generate(prompt(LONG), GenerateOptions(60)):
                scene.tokens.append(token.id)
                await once(at(5, both)(len(scene.tokens)))
            assert len(left) == 1  # it did not wait for the session's end
        assert scene.tokens[:NEW] == expected[LONG]
        assert scene.lost == scene.blamed == set(victims)
