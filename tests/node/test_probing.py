"""Who goes and looks when somebody is called dead."""

from random import Random
from types import SimpleNamespace

import trio

from petalnode.probing import ASKED_PROBES, Watch
from petalnode.routing.view import SwarmView

from ..routing.records import record

SIZE = 200


class FakeHost:
    """Was connected to everybody once, and is to one now."""

    peer_id = "own"

    def __init__(self):
        self.connected = [f"p{number:03}" for number in range(SIZE)]

    def connected_peers(self):
        return self.connected

    def rtt_s(self, peer_id):
        return 0.1

    def on_disconnect(self, callback):
        pass


async def test_in_a_large_swarm_those_who_are_connected_look_and_few_others(autojump_clock):
    """To have met a peer once is no reason: in the end everybody has met everybody."""
    view, host = SwarmView(), FakeHost()
    for peer_id in host.connected:
        view.apply(record(peer_id), trio.current_time(), b"")
    gossip = SimpleNamespace(view=view)
    watch = Watch(host, gossip, lambda: None, Random(1), lambda: 0.0)
    assert len(watch.rtts()) == SIZE + 1
    host.connected = ["p100"]
    for number in range(SIZE):
        gossip.on_suspect(f"p{number:03}")
    assert "p100" in watch._in_line
    assert ASKED_PROBES / 2 < len(watch._in_line) < 2 * ASKED_PROBES
