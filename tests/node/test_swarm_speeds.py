"""What a node measured of a peer counts for as long as the peer serves what it was measured on."""

from dataclasses import replace

import pytest
import trio

from petalnode.simnet.world import open_world


@pytest.mark.parametrize(
    ("change", "is_kept"),
    [({}, True), ({"start": 1}, False), ({"end": 2}, False), ({"quant": "nf4"}, False)],
)
async def test_speeds_of_who_serves_something_else_are_forgotten(
    tiny_checkpoint, autojump_clock, change, is_kept
):
    async with open_world(1, str(tiny_checkpoint())) as world:
        await world.start("server", blocks=(0, 3))
        swarm = (await world.start("client")).swarm
        await trio.sleep(1)
        server = world.peer_id("server")
        swarm.observe(server, 3, 0.3)
        swarm.observe(server, 3, 0.6, bulk=True)
        record = swarm.view.get(server, trio.current_time())
        swarm.view.apply(replace(record, seq=record.seq + 1, **change), trio.current_time(), b"")
        known = swarm.knowledge()
        assert (server in known.decode_s, server in known.forward_s) == (is_kept, is_kept)
        swarm.observe(server, 1, 5.0)
        first = swarm.knowledge().decode_s[server]
        assert (first == 5.0) != is_kept  # nothing of what was before is in it
        assert (server in swarm.knowledge().forward_s) == is_kept
