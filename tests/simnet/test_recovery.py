"""The kill matrix: real nodes on a virtual network; whatever dies, the tokens are transformers'."""

import pytest
import trio

from petalnode.errors import NoRoute
from petalnode.events import Waiting
from petalnode.p2p.yamux import PING_INTERVAL_S, SILENCE_LIMIT_S
from petalnode.probing import PROBE_DEADLINE_S
from petalnode.protocol import HOP_PROTOCOL
from petalnode.session.session import GenerateOptions

from ..models.reference import load_reference, reference_generate
from .scene import (
    FREED_WITHIN_S,
    LONG,
    ONCE,
    SEEDS,
    SHORT,
    STALL_S,
    TWICE,
    at,
    checkpoint,
    expected,
    open_scene,
    path,
    prompt,
)

__all__ = ["checkpoint", "expected", "path"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
@pytest.mark.parametrize("places", ["0", "1", "3", "12", "02", "23", "0123"])
async def test_hops_die(checkpoint, expected, autojump_clock, places, silent, seed):
    async with open_scene(checkpoint, seed) as scene:
        dead = []

        def kill() -> None:
            dead.extend(scene.hop(int(place)) for place in places)
            for name in dead:
                scene.world.kill(name, silent=silent)

        await scene.generate(at(5, kill))
        assert scene.tokens == expected[SHORT]
        assert scene.lost == set(dead)
        assert scene.blamed <= set(dead)
        assert not set(dead) & set(scene.route)
        assert max(scene.seconds) < (STALL_S if silent else 1.0)
        if silent:  # a probe that nobody answers must end first
            await trio.sleep(PROBE_DEADLINE_S)
        live = {a.name for a in scene.client.swarm.live()}
        assert not live & scene.blamed
        assert live >= set(TWICE) - set(dead)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", [0, 1, 3])
async def test_death_during_prefill(checkpoint, expected, autojump_clock, place, seed):
    async with open_scene(checkpoint, seed, bandwidth=1e6) as scene:
        dead = []

        def arrange() -> None:
            victim, world = scene.hop(place), scene.world
            fed = scene.hop(place - 1) if place else "client"
            seen = world.bytes_sent(fed, victim, HOP_PROTOCOL)

            def kill(parcel) -> None:
                dead.append(victim)
                world.kill(victim)

            def reached(parcel) -> bool:
                mine = (parcel.source, parcel.target) == (fed, victim)
                return mine and world.bytes_sent(fed, victim, HOP_PROTOCOL) > seen + 40_000

            world.when(reached, kill)

        await scene.generate(at(0, arrange), LONG)
        assert scene.tokens == expected[LONG]
        assert scene.lost == set(dead) != set()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("second", ["sender", "replacement", "next"])
async def test_another_dies_during_the_replay(checkpoint, expected, autojump_clock, second, seed):
    spans = {**TWICE, "b3": (1, 2), "c3": (2, 3)}
    async with open_scene(checkpoint, seed, spans, bandwidth=1e6) as scene:
        dead = []

        def arrange() -> None:
            world, sender, victim, following = scene.world, *(scene.hop(n) for n in (1, 2, 3))
            others = {"c", "c2", "c3"} - {victim}
            before = {name: world.bytes_sent(sender, name) for name in others}
            dead.append(victim)
            world.kill(victim)

            def replays(parcel) -> bool:
                to = parcel.target
                return parcel.source == sender and to in others and parcel.total > before[to] + 9000

            def kill(parcel) -> None:
                who = {"sender": sender, "replacement": parcel.target, "next": following}[second]
                dead.append(who)
                world.kill(who)

            world.when(replays, kill)

        await scene.generate(at(5, arrange), LONG)
        assert scene.tokens == expected[LONG]
        assert len(dead) == 2
        assert set(dead) <= scene.lost
        assert scene.blamed <= set(dead)


async def test_a_replacement_refuses(checkpoint, expected, autojump_clock):
    async with open_scene(checkpoint, 1, {**TWICE, "c3": (2, 3)}) as scene:

        def arrange() -> None:
            victim = scene.hop(2)
            other = next(name for name in ("c", "c2", "c3") if name != victim)
            scene.world._members[other].node.service.server.draining = True
            scene.world.kill(victim)

        await scene.generate(at(5, arrange))
        assert scene.tokens == expected[SHORT]
        assert len(scene.blamed) == 1


async def test_a_replacement_is_full(checkpoint, expected, autojump_clock):
    spans = {**ONCE, "full": (2, 3), "c2": (2, 3)}
    async with open_scene(checkpoint, 1, spans, small=["full"]) as scene:

        def arrange() -> None:
            for name in ("c", "c2"):
                if name != scene.hop(2):
                    scene.world.partition("client", name, for_s=2.0)
            scene.world.kill(scene.hop(2))

        await scene.generate(at(5, arrange), LONG)
        assert scene.tokens == expected[LONG]
        assert "full" not in scene.blamed | set(scene.route)


HALVES = {"x": (0, 2), "y": (2, 4)}


@pytest.mark.parametrize(
    ("spans", "late", "dead", "chains"),
    [
        (ONCE, {"w": (1, 3)}, "bc", ["awd", "awwd"]),
        (HALVES, {"c": (2, 3), "d": (3, 4)}, "y", ["xcd"]),
        (HALVES, {"odd": (1, 4)}, "y", ["xodd"]),
        (HALVES, {"odd": (1, 3), "d": (3, 4)}, "y", ["xoddd"]),
        (ONCE, {"all": (0, 4)}, "abcd", ["all"]),
    ],
)
async def test_other_boundaries(checkpoint, expected, autojump_clock, spans, late, dead, chains):
    """One for two, two for one, and one whose span begins elsewhere."""
    async with open_scene(checkpoint, 2, spans) as scene:

        async def arrange() -> None:
            for name, blocks in late.items():
                await scene.world.start(name, blocks=blocks)
            await trio.sleep(0.1)  # for the client to hear of them
            for name in dead:
                scene.world.kill(name)

        await scene.generate(at(5, arrange))
        assert scene.tokens == expected[SHORT]
        assert "".join(scene.route) in chains
        assert scene.lost == set(dead)


async def test_no_replacement_now(checkpoint, expected, autojump_clock):
    async with open_scene(checkpoint, 1, ONCE) as scene:

        async def come_back() -> None:
            scene.world.kill("b")
            scene.nursery.start_soon(join_later)

        async def join_later() -> None:
            await trio.sleep(20)
            await scene.world.start("late", blocks=(1, 2))

        await scene.generate(at(5, come_back))
        assert scene.tokens == expected[SHORT]
        assert scene.route == ["a", "late", "c", "d"]
        waited = [event for event in scene.events if isinstance(event, Waiting)]
        assert waited[-1].why == "Block 1 is served by nobody."
        assert waited[-1].for_s > 60
        assert 20 < max(scene.seconds) < 22


async def test_a_node_that_failed_before_is_asked_where_nobody_else_is_left(
    checkpoint, expected, autojump_clock
):
    """It came back, but its ban would last for minutes."""
    async with open_scene(checkpoint, 1) as scene:

        def arrange() -> None:
            victim = scene.hop(1)
            other = scene.world.peer_id({"b", "b2"}.difference({victim}).pop())
            for strike in range(6):
                scene.client.swarm.health.failed(
                    other, trio.current_time() - 600 + strike * 100, ""
                )
            assert other in scene.client.swarm.health.banned(trio.current_time())
            scene.world.kill(victim)

        await scene.generate(at(5, arrange))
        assert scene.tokens == expected[SHORT]
        assert max(scene.seconds) < 1.0


async def test_nobody_ever_comes(checkpoint, autojump_clock):
    async with open_scene(checkpoint, 1, ONCE) as scene:
        with pytest.raises(NoRoute) as caught:
            await scene.generate(at(5, lambda: scene.world.kill("b")))
        assert caught.value.missing == (1,)
        assert trio.current_time() < 150


@pytest.mark.parametrize("oneway", [False, True])
@pytest.mark.parametrize("ends", ["client-0", "0-1", "1-2", "3-client", "1-client", "client-2"])
async def test_a_silent_partition(checkpoint, expected, autojump_clock, ends, oneway):
    """Between two hops, or a hop and the client; nobody is told. It never heals."""
    async with open_scene(checkpoint, 3) as scene:
        names = []

        def part() -> None:
            names.extend(end if end == "client" else scene.hop(int(end)) for end in ends.split("-"))
            scene.world.partition(*names, oneway=oneway)

        await scene.generate(at(5, part))
        assert scene.tokens == expected[SHORT]
        assert sum(scene.seconds) < 2 * STALL_S
        assert scene.blamed <= set(names)
        await trio.sleep(15)  # a hop that we cannot tell finds out by itself


@pytest.mark.parametrize("oneway", [False, True])
async def test_hops_that_do_not_reach_each_other_are_relayed(
    checkpoint, expected, autojump_clock, oneway
):
    """There are no others, so the client passes on between them what both can send to it."""
    async with open_scene(checkpoint, 3, ONCE) as scene:
        await scene.generate(at(5, lambda: scene.world.partition("b", "c", oneway=oneway)))
        assert scene.tokens == expected[SHORT]
        assert scene.route == ["a", "b", "c", "d"]
        assert scene.blamed == set()
        assert sum(scene.seconds) < 2 * STALL_S
        assert scene.world.bytes_sent("client", "c", HOP_PROTOCOL) > 3000


@pytest.mark.parametrize("seed", SEEDS)
async def test_death_around_a_rollback(checkpoint, path, autojump_clock, seed):
    again = [*prompt(SHORT)[:12], 5, 6]
    wanted = reference_generate(load_reference(path), again, 10)
    async with (
        open_scene(checkpoint, seed) as scene,
        scene.client.open_session(scene.events.append) as session,
    ):
        scene.session = session
        async for _ in session.generate(prompt(SHORT), GenerateOptions(10)):
            pass
        session.rollback(12)
        scene.world.kill(scene.hop(2))
        if seed % 2:
            scene.world.kill(scene.hop(1))
        rest = session.generate([5, 6], GenerateOptions(10))
        assert [token.id async for token in rest] == wanted


@pytest.mark.parametrize("place", [0, 2])
async def test_a_hop_that_computes_for_ever(checkpoint, expected, autojump_clock, place):
    """It answers, its connections live, but no step comes out of it."""
    async with open_scene(checkpoint, 1) as scene:
        stuck = []

        def hang() -> None:
            stuck.append(scene.hop(place))
            scene.world.slow_down(stuck[0], 1e4)

        await scene.generate(at(5, hang))
        assert scene.tokens == expected[SHORT]
        assert max(scene.seconds) < STALL_S
        assert scene.lost == set(stuck)
        await trio.sleep(22)  # its computation ends at last


async def test_a_client_that_is_gone_frees_its_cache(checkpoint, autojump_clock):
    async with open_scene(checkpoint, 1) as scene, scene.client.open_session() as session:
        async for token in session.generate(prompt(SHORT), GenerateOptions(5)):
            assert token
        assert len([n for n in scene.left_over() if not n.endswith("log")]) == 4
        scene.world.kill("client")
        await trio.sleep(FREED_WITHIN_S)
        assert scene.left_over() == []


async def test_a_client_whose_machine_is_off_frees_its_cache(checkpoint, autojump_clock):
    async with open_scene(checkpoint, 1) as scene, scene.client.open_session() as session:
        async for token in session.generate(prompt(SHORT), GenerateOptions(5)):
            assert token
        scene.world.kill("client", silent=True)
        await trio.sleep(SILENCE_LIMIT_S + 2 * PING_INTERVAL_S)
        assert scene.left_over() == []
