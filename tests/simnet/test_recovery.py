"""The kill matrix: real nodes on a virtual network; whatever dies, the tokens are transformers'."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
import torch
import trio

from petalnode.errors import NoRoute, PeerError, PeerUnreachable
from petalnode.events import Recovered, Route, Waiting
from petalnode.models.checkpoint import open_checkpoint
from petalnode.node import Node
from petalnode.nurseries import plain_errors
from petalnode.p2p.yamux import PING_INTERVAL_S, SILENCE_LIMIT_S
from petalnode.probing import PROBE_DEADLINE_S
from petalnode.protocol import HOP_PROTOCOL
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
STRIKES = 25
SEEDS = range(int(os.environ.get("PETALNODE_TEST_SEEDS", "1")))
Disturb = Callable[[], Awaitable[None] | None]
STALL_S = 8.0  # keepalive notices silence within 6 s; a replay and a round trip come after it


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
