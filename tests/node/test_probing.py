"""Who goes and looks when somebody is called dead, whom a node may accuse, and who comes back."""

from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from petalnode.errors import PeerUnreachable
from petalnode.probing import ASKED_PROBES, DOUBT_S, TELL_SPREAD_S, Watch
from petalnode.routing.beats import Census
from petalnode.routing.suspicion import Suspicions
from petalnode.routing.view import SwarmView

from ..routing.records import record

SIZE = 200
LONG_S = 8e4


class FakeHost:
    """Connected to those in ``connected``; whoever is in ``dead`` does not answer."""

    peer_id = "own"

    def __init__(self, connected=()):
        self.connected = list(connected)
        self.dead = set()
        self.callbacks = {}

    def connected_peers(self):
        return self.connected

    def rtt_s(self, peer_id):
        return 0.1

    def on_disconnect(self, callback, *, goodbye=None):
        self.callbacks[goodbye] = callback

    def learn(self, peer_id, addrs):
        pass

    def is_in_use(self, peer_id):
        return False

    async def ping(self, peer_id):
        await trio.sleep(0.1)
        if peer_id in self.dead:
            raise PeerUnreachable("It is away.", "Wait.", peer_id)
        return 0.1


class FakeGossip:
    """A view and its suspicions, and what was said."""

    def __init__(self):
        self.view = SwarmView()
        self.suspicions = Suspicions("own", self.view)
        self.accused = []

    def bury(self, peer_id):
        self.view.forget(peer_id)

    def unbury(self, peer_id):
        return self.view.revive(peer_id, trio.current_time())

    def may_return(self, peer_id, now):
        return self.view.get(peer_id, now) is None and self.view.would_live(peer_id, now)

    def accusers(self, peer_id):
        return 0

    async def accuse(self, suspicion):
        self.accused.append(suspicion.accused)

    def mesh_peers(self):
        return set()

    def meet(self, peer_id, **changes):
        known = record(peer_id, **{"ttl_s": LONG_S, **changes})
        self.view.apply(known, trio.current_time(), b"%d" % known.seq)

    def sees(self, peer_id):
        return self.view.get(peer_id, trio.current_time()) is not None


@asynccontextmanager
async def watching(host, gossip, own_record, census=None):
    watch = Watch(host, gossip, own_record, census or Census(), Random(1), lambda: 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(1)
        yield watch
        nursery.cancel_scope.cancel()


def client():
    """What a client announces."""
    return None


def server():
    return record("own")


async def test_in_a_large_swarm_those_who_are_connected_look_and_few_others(autojump_clock):
    """To have met a peer once is no reason: in the end everybody has met everybody."""
    host, gossip = FakeHost(f"p{number:03}" for number in range(SIZE)), FakeGossip()
    for peer_id in host.connected:
        gossip.meet(peer_id)
    watch = Watch(host, gossip, client, Census(), Random(1), lambda: 0.0)
    assert len(watch.rtts()) == SIZE + 1
    host.connected = ["p100"]
    for number in range(SIZE):
        gossip.on_suspect(f"p{number:03}")
    assert "p100" in watch._in_line
    assert ASKED_PROBES / 2 < len(watch._in_line) < 2 * ASKED_PROBES


async def test_a_client_that_lost_a_living_peer_finds_it_again_soon(autojump_clock):
    """It tells nobody, so nobody refutes; the next beat may be twenty minutes away."""
    host, gossip = FakeHost(["p", "q"]), FakeGossip()
    gossip.meet("p")
    gossip.meet("q")
    async with watching(host, gossip, client) as watch:
        host.dead, host.connected = {"p", "q"}, []
        watch.check("p")
        watch.check("q")
        await trio.sleep(1)
        assert not gossip.sees("p")
        host.dead = {"q"}
        await trio.sleep(2 * DOUBT_S)
        assert gossip.sees("p")
        await trio.sleep(10 * DOUBT_S)
        assert not gossip.sees("q")  # it is dead
        assert not gossip.accused


async def test_a_client_does_not_raise_those_who_left_meanwhile(autojump_clock):
    host, gossip = FakeHost(["p"]), FakeGossip()
    gossip.meet("p")
    async with watching(host, gossip, client) as watch:
        host.dead, host.connected = {"p"}, []
        watch.check("p")
        await trio.sleep(1)
        gossip.meet("p", seq=2, state="offline")
        host.dead = set()
        await trio.sleep(3 * DOUBT_S)
        assert not gossip.sees("p")
        assert not watch._doubted


async def test_only_those_are_accused_that_were_met_before(autojump_clock):
    """A node behind a one-way NAT keeps its voice: it may say nothing of those it never reached."""
    host, gossip = FakeHost(["met"]), FakeGossip()
    gossip.meet("met")
    gossip.meet("never")
    host.dead = {"never"}
    async with watching(host, gossip, server) as watch:
        watch.check("never")
        host.dead, host.connected = {"met", "never"}, []
        watch.check("met")
        await trio.sleep(1 + TELL_SPREAD_S)
        assert gossip.accused == ["met"]
        assert not gossip.sees("never")  # for this node it is of no use either way


async def test_who_says_goodbye_is_neither_probed_nor_dialled(autojump_clock):
    host, gossip = FakeHost(["p"]), FakeGossip()
    gossip.meet("p")
    async with watching(host, gossip, server) as watch:
        host.connected = []
        host.callbacks[True]("p")
        assert not watch._in_line
        assert not watch._may_dial("p")
        host.callbacks[False]("p")
        assert watch._in_line == {"p"}


@pytest.mark.parametrize("fake", [False, True])
async def test_a_view_full_of_keys_is_found_to_be_empty(autojump_clock, fake):
    host, gossip, census = FakeHost(), FakeGossip(), Census()
    names = [f"p{number:03}" for number in range(SIZE)]
    for peer_id in names:
        gossip.meet(peer_id)
    host.dead = set(names) if fake else set()
    async with watching(host, gossip, server, census):
        await trio.sleep(120)
    assert census.size(10_000) == 10_000 if not fake else census.size(10_000) < 300
