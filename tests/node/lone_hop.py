"""One session of a hop, by itself: a client, feeds and peers at the ends of memory streams."""

from contextlib import asynccontextmanager
from types import SimpleNamespace

import torch
import trio
import trio.testing

from petalnode.errors import PeerError, PeerUnreachable
from petalnode.models.kv_cache import RowCache
from petalnode.p2p.memory import memory_frame_pair
from petalnode.protocol import BadMessage, Link, Open, Replay, Segment, Step
from petalnode.serving.budget import KvBudget
from petalnode.serving.hop_session import HopSession
from petalnode.serving.rows import Refusal

ROOM = 10_000
WIDTH = 2
NOTHING = Replay((0,), (0,))
HANGS_S = 120.0


class Engine:
    """Adds one to what comes, once it may; ``held`` keeps it waiting."""

    def __init__(self):
        self.config = SimpleNamespace(max_positions=100, hidden_size=WIDTH)
        self.span, self.tokens, self.held, self.error = self, 0, None, None
        self.asked = []

    def new_row(self, start, end):
        return RowCache(start, end, 1, 2, torch.float32, torch.device("cpu"))

    async def run(self, start, end, rows, hidden):
        self.asked.append((start, end, len(hidden)))
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error
        for row in rows:
            row.cache.truncate(row.position)
            for block in range(start, end):
                row.cache.extend(block, torch.zeros(2, 1, row.n, 2))
            row.cache.advance(row.n)
        self.tokens += len(hidden)
        return hidden + 1


class Tuning:
    """What a session adds, in two frames."""

    def __init__(self):
        self.added, self.frames, self.refusal, self.dropped = "served", 0, None, False
        self.held = trio.Event()
        self.held.set()

    async def take(self, frame):
        await self.held.wait()
        self.frames += 1
        if self.refusal is not None:
            raise self.refusal
        if self.frames < 2:
            return False
        self.added = "what came"
        return True

    def drop(self):
        self.dropped = True


class Hop:
    """A session of blocks ``[1, 3)``, its client's control stream, and peers that take feeds."""

    def __init__(self, nursery, rows=1, sender=None):
        self.nursery = nursery
        self.client, theirs = memory_frame_pair("client", "hop")
        self.control = theirs
        theirs.peer_id = "client"
        self.engine, self.tuning = Engine(), Tuning()
        self.budget, self.logs = KvBudget(ROOM, 2), KvBudget(ROOM, 1)
        self.received, self.dialled, self.answer, self.dialling = {}, [], "fed", None
        opened = Open(bytes(16), "f" * 32, 1, 3, rows, sender)
        self.session = HopSession(
            opened, theirs, self.engine, self.budget, self.logs, self.connect, self.tuning
        )
        self.ended = trio.Event()
        self.error = None

    async def serve(self):
        try:
            await self.session.serve()
        except (BadMessage, PeerError) as error:
            self.error = error
        self.ended.set()

    async def connect(self, peer, addrs, protocol):
        """Every peer but ``ghost`` is there; what it got lies in ``received``."""
        self.dialled.append((peer, addrs, protocol))
        if self.dialling is not None:
            await self.dialling.wait()
        if peer == "ghost":
            raise PeerUnreachable("Peer ghost is not there.", peer_id=peer)
        ours, theirs = memory_frame_pair("hop", peer)
        self.received.setdefault(peer, []).append(theirs)
        self.nursery.start_soon(self.take_feed, theirs)
        return ours

    async def take_feed(self, stream):
        first = await stream.receive()
        stream.first = first.header
        if self.answer is not None:
            await stream.send({"type": self.answer})

    async def feed(self, peer="client"):
        """A feed of the peer's that was accepted."""
        ours, task = self.open_feed(peer)
        assert (await ours.receive()).header == {"type": "fed"}
        assert not task.ended
        return ours

    def open_feed(self, peer="client"):
        """The peer's end of a feed, and how its task ends."""
        ours, theirs = memory_frame_pair(peer, "hop")
        theirs.peer_id = peer
        task = SimpleNamespace(ended=False, error=None)

        async def run():
            try:
                await self.session.serve_feed(theirs)
            except (PeerError, BadMessage, Refusal) as error:
                task.error = error
                theirs.reset()
            task.ended = True

        self.nursery.start_soon(run)
        return ours, task

    async def ask(self, **message):
        await self.client.send(message)
        return await self.heard()

    async def heard(self):
        return (await self.client.receive()).header

    async def quiet(self):
        """Nothing more comes to the client."""
        await trio.testing.wait_all_tasks_blocked()
        return not self.client._raw._in.data

    def link(self, number, peer="next", replay=NOTHING, spare=False, addrs=("/a",)):
        session = None if number is None else bytes([number] * 16)
        return Link(peer, session or bytes(16), addrs, replay, spare).to_wire()


def step(position, n, *, seq=1, want=0, took=()):
    header = Step(seq, (Segment(0, position, n, want),), took=took).to_wire()
    return header, [torch.arange(float(n * WIDTH)).reshape(n, WIDTH) + 100 * position]


@asynccontextmanager
async def a_hop(**options):
    async with trio.open_nursery() as nursery:
        hop = Hop(nursery, **options)
        nursery.start_soon(hop.serve)
        with trio.fail_after(HANGS_S):
            assert await hop.heard() == {"type": "opened"}
            yield hop
        hop.client.reset()
        await hop.ended.wait()
        assert (hop.budget.used, hop.logs.used, hop.tuning.dropped) == (0, 0, True)
        nursery.cancel_scope.cancel()


def stall(ours):
    """Nothing more can be written to this end."""
    ours._raw._in.data += bytes(2 << 20)


def is_reset(stream):
    return stream._raw._in.broken
