"""A node: one machine's part in one model's swarm. ``open_node`` is the way in.

    async with open_node("demo", NodeOptions(join=("pn1:…",))) as node:
        async with node.open_session() as session:
            async for token in session.generate("def fibonacci(n):"):
                print(token.text, end="")

Nursery nesting is shutdown order: host > gossip > node > sessions. Leaving the context says goodbye
to the swarm, closes sessions, then gossip, then the host.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from functools import partial

import trio

from petalnode.bandwidth import BandwidthMeter
from petalnode.errors import PeerError, UsageError
from petalnode.events import Downloading, Report, ignore
from petalnode.holding import Holding, Terms, dtype_name
from petalnode.joining import (
    join_swarm,
    known_network,
    listening,
    make_invite,
    parse_joins,
)
from petalnode.machine import Machine, this_machine
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.client import ClientParts
from petalnode.models.devices import pick_device, pick_dtype
from petalnode.models.loading import load_client
from petalnode.models.quantize import check_quant
from petalnode.models.tokenizer import Tokenizer
from petalnode.models.tuning.peft_files import Adapter
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.nurseries import plain_errors
from petalnode.opening import Ask, ChainOpener
from petalnode.options import NodeOptions
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import Identity, acquire_identity, new_identity
from petalnode.p2p.memory import memory_frame_pair
from petalnode.placing import Balancer, choose_span
from petalnode.protocol import HOP_PROTOCOL
from petalnode.reunion import seek_friends
from petalnode.routing.chain import Gap
from petalnode.routing.costs import ANYTHING, Workload
from petalnode.serving.memory_plan import plan_memory
from petalnode.serving.service import SpanService, free_memory
from petalnode.session.added import Added, find_added, own_tuning
from petalnode.session.hidden import HiddenSession, check_span
from petalnode.session.session import IdsSource, Session, check_rows
from petalnode.swarm import Swarm, open_swarm
from petalnode.training.opening import open_training
from petalnode.training.peers import SwarmPeers
from petalnode.training.protocol import TRAIN_PROTOCOL
from petalnode.training.session import Desk, TrainingSession

__all__ = ["Node", "NodeOptions", "open_node"]


class Node:
    """An open node. Made by ``open_node``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: NodeOptions,
        host: Host,
        swarm: Swarm,
        nursery: trio.Nursery,
        report: Report,
        machine: Machine,
        meter: BandwidthMeter,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.swarm = swarm
        self._host = host
        self._nursery = nursery
        self._report = report
        self._machine = machine
        self._compute = machine.compute()
        self._device = pick_device(options.device)
        self._dtype = pick_dtype(options.dtype, checkpoint.config.dtype, self._device)
        token_bytes = checkpoint.config.hidden_size * self._dtype.itemsize
        self._chains = ChainOpener(checkpoint, swarm, host, self, machine.rng, token_bytes)
        self._holding = self._empty_holding(meter)
        self._balancing = trio.CancelScope()
        self._client: tuple[ClientParts, Tokenizer] | None = None
        self._loading_client = trio.Lock()

    @property
    def peer_id(self) -> str:
        """This node's libp2p peer id, base58."""
        return self._host.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs under which others reach this node; none for a client."""
        return self._host.addrs

    @property
    def blocks(self) -> tuple[int, int] | None:
        """The span ``[start, end)`` that this node holds, if any."""
        return self._holding.blocks

    @property
    def service(self) -> SpanService | None:
        """What serves them, once they are loaded."""
        return self._holding.service

    @property
    def invite(self) -> str:
        """A string that lets another machine join this swarm through this node."""
        return make_invite(self._host, self.checkpoint, self.swarm.network)

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A stream to a peer, or, without any network, to this node's own hop server."""
        if peer_id != self.peer_id:
            return await self._host.open_stream(peer_id, protocol)
        ours, theirs = memory_frame_pair(self.peer_id, self.peer_id)
        self._nursery.start_soon(self._serve_local, theirs, protocol)
        return ours

    @asynccontextmanager
    async def open_session(
        self,
        report: Report = ignore,
        workload: Workload = ANYTHING,
        *,
        rows: int = 1,
        adapter: str | Adapter = "",
    ) -> AsyncIterator[Session]:
        """A session over the best chain there is now; leaving it frees its caches everywhere.

        ``workload`` is what it needs of every hop: room, context, adapters, exact weights. ``rows``
        is how many sequences it may have at once: prompts times beams. ``adapter`` is one of the
        caller's own, or the name or place of one as ``--adapter`` takes it. Waits for blocks that
        nobody serves, with a reason and a deadline. Raises ``NoRoute``, or what the last chain
        tried failed with; ``UsageError`` for a number of rows that no session has, or an adapter
        that is not one.
        """
        check_rows(rows)
        config = self.checkpoint.config
        added = await self.find_adapter(adapter)
        workload = added.asked_of(workload, rows, config.max_positions)
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._load_client)
                await self.swarm.wait_covered(report, workload)
                await self.swarm.probe()
        client, tokenizer = await self._load_client()
        async with AsyncExitStack() as stack:
            source = IdsSource(added.client(client), self._compute, rows)
            ask = Ask(workload, report, source, rows, added=added)
            chain = await self._chains.open(stack, ask)
            yield Session(chain, source, tokenizer, self._compute)

    @asynccontextmanager
    async def open_hidden(
        self,
        start: int,
        end: int,
        report: Report = ignore,
        workload: Workload = ANYTHING,
        *,
        rows: int = 1,
        tuning: Tuning = NOTHING,
        served: str = "",
    ) -> AsyncIterator[HiddenSession]:
        """Blocks ``[start, end)`` alone, with ``tuning`` added, for hidden states of the caller's;
        or with an adapter that hops offer, by the name that ``find_adapter`` gives.

        Waits and raises as ``open_session`` does; ``UsageError`` for blocks that there are not, and
        for a tuning that these blocks cannot run. It is copied.
        """
        check_span(start, end, self.checkpoint.config.num_blocks)
        check_rows(rows)
        config = self.checkpoint.config
        added = await own_tuning(tuning, config, (start, end), self._compute)
        if served:
            added = Added(served=served)
        workload = added.asked_of(workload, rows, config.max_positions)
        ask = Ask(workload, report, rows=rows, gap=Gap(start, end), added=added)
        await self._chains.wait_served(ask)
        await self.swarm.probe()
        async with AsyncExitStack() as stack:
            chain = await self._chains.open(stack, ask)
            yield HiddenSession(chain, self._dtype, config.max_positions)

    @asynccontextmanager
    async def open_training(
        self, start: int = 0, end: int | None = None, report: Report = ignore
    ) -> AsyncIterator[TrainingSession]:
        """Forward and backward through blocks ``[start, end)``, by default all of them.

        What it trains stays here; leaving it makes every hop forget what was sent. Work waits for
        peers as sessions do. Raises ``UsageError`` for blocks that there are not.
        """
        config = self.checkpoint.config
        span = (start, config.num_blocks if end is None else end)
        check_span(*span, config.num_blocks)
        await self.swarm.probe()
        desk = Desk(config, self._compute)
        workload = Workload(token_bytes=config.hidden_size * self._dtype.itemsize)
        peers = SwarmPeers(self.swarm, workload, self._host.learn)
        fingerprint = self.checkpoint.fingerprint
        async with open_training(self, fingerprint, peers, desk, span, report) as training:
            yield training

    async def find_adapter(self, adapter: str | Adapter) -> Added:
        """What is meant by an adapter of the caller's, or by the name or place of one: see
        ``session.added.find_added``."""
        records, cache_dir = self.swarm.live(), self.options.cache_dir
        return await find_added(adapter, self.checkpoint.config, records, self._compute, cache_dir)

    async def drain(self) -> None:
        """Take no new sessions, tell the swarm, wait until those here end or the deadline."""
        self._balancing.cancel()
        await self._holding.drain()

    async def client_parts(self) -> ClientParts:
        """The model's embeddings, norm and head, loaded when a session or this first needs them."""
        client, _ = await self._load_client()
        return client

    async def _load_client(self) -> tuple[ClientParts, Tokenizer]:
        """What of the model is the client's, once."""
        async with self._loading_client:
            if self._client is None:
                tokenizer = await self._compute.run(self.checkpoint.tokenizer)
                load = partial(load_client, self.checkpoint, dtype=self._dtype, device=self._device)
                client = await self._compute.run(partial(load, fetching=self._fetching))
                self._client = client, tokenizer
            return self._client

    def _fetching(self, file: str, done: int, total: int) -> None:
        self._compute.tell(lambda: self._report(Downloading(file, done, total)))

    def _empty_holding(self, meter: BandwidthMeter) -> Holding:
        options, host = self.options, self._host
        terms = Terms(
            checkpoint=self.checkpoint,
            peer_id=host.peer_id,
            addrs=host.addrs,
            name=options.name,
            dtype=self._dtype,
            device=self._device,
            quant=options.quant,
            kv_tokens=options.kv_tokens,
            replay_log_tokens=options.replay_log_tokens,
            pinned=options.blocks is not None,
            adapters=options.adapters,
            cache_dir=options.cache_dir,
        )
        return Holding(
            terms,
            self.swarm,
            self._machine,
            self._compute,
            self._connect,
            meter,
            self._nursery,
            self._report,
        )

    async def _serve(self) -> None:
        """Choose a span, load it, and serve it, or another, until the node closes."""
        await self._holding.find_adapters()  # they take room in every block
        size, pinned = self._plan_blocks(), self.options.blocks
        if pinned is not None:
            await self._holding.intend(pinned)
        else:
            await choose_span(self._holding, self.swarm, size, self._machine.rng)
        self._host.serve(HOP_PROTOCOL, self._holding.handle)
        self._host.serve(TRAIN_PROTOCOL, self._holding.handle_training)
        await self._holding.load()
        if pinned is None:
            self._nursery.start_soon(self._balance)

    async def _balance(self) -> None:
        with self._balancing:
            planning = self._machine.compute()
            await Balancer(self._holding, self.swarm, self._machine.rng, planning).run()

    def _plan_blocks(self) -> int:
        """How many blocks: as asked for, or as many as fit; says why."""
        pinned = self.options.blocks
        plan = plan_memory(
            self.checkpoint.config,
            free_memory(self._device),
            dtype=dtype_name(self._dtype),
            quant=self.options.quant,
            wanted=pinned[1] - pinned[0] if pinned else self.options.num_blocks or None,
            adapters=self._holding.adapter_bytes,
        )
        self._report(plan)
        return plan.blocks

    async def _connect(self, peer_id: str, addrs: tuple[str, ...], protocol: str) -> FrameStream:
        self._host.learn(peer_id, addrs)
        return await self.open_stream(peer_id, protocol)

    async def _serve_local(self, stream: FrameStream, protocol: str) -> None:
        """What the host does for streams from outside: an error costs that stream alone."""
        training = protocol == TRAIN_PROTOCOL
        try:
            await (self._holding.handle_training if training else self._holding.handle)(stream)
        except (PeerError, trio.TooSlowError):
            pass
        finally:
            stream.reset()


@asynccontextmanager
async def open_node(
    model: str | Checkpoint,
    options: NodeOptions | None = None,
    report: Report = ignore,
    *,
    machine: Machine | None = None,
) -> AsyncIterator[Node]:
    """Join or found the swarm of ``model`` (MODEL as on the command line, or an open checkpoint).

    A serving node is ready when the body starts. Raises ``ModelError``, ``UsageError``,
    ``ListenError``, ``SwarmMismatch`` or ``PeerUnreachable``. ``report`` gets what happens;
    a simulator brings its ``machine``.
    """
    options, machine = options or NodeOptions(), machine or this_machine()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    check_blocks(checkpoint, options)
    check_quant(options.quant, pick_device(options.device))
    joins = parse_joins(options.join)
    network, meter = known_network(joins, checkpoint, machine.rng), BandwidthMeter()
    with plain_errors():
        async with AsyncExitStack() as stack:
            identity = stack.enter_context(node_identity(options, machine))
            host = await stack.enter_async_context(
                open_host(
                    identity,
                    listen=options.listen,
                    announce=options.announce,
                    transport=machine.transport,
                    tap=lambda stream, protocol: meter.tap(machine.tap(stream, protocol), protocol),
                )
            )
            if network is not None and options.serves:
                report(listening(host, checkpoint, network))
            joined = await join_swarm(host, joins, network, checkpoint.fingerprint)
            if network is None and options.serves:
                report(listening(host, checkpoint, joined.network))
            swarm = await stack.enter_async_context(
                open_swarm(host, identity, checkpoint, joined, machine)
            )
            nursery = await stack.enter_async_context(trio.open_nursery())
            node = Node(checkpoint, options, host, swarm, nursery, report, machine, meter)
            nursery.start_soon(swarm.run)
            nursery.start_soon(seek_friends, host, swarm)
            try:
                if options.serves:
                    await node._serve()
                yield node
            finally:
                await node._holding.leave()
                nursery.cancel_scope.cancel()


def check_blocks(checkpoint: Checkpoint, options: NodeOptions) -> None:
    """Raise ``UsageError`` if the model has fewer blocks than were asked for."""
    has = checkpoint.config.num_blocks
    last = options.blocks[1] if options.blocks else options.num_blocks or 0
    if last > has:
        raise UsageError(
            f"{checkpoint.name} has {has} blocks, 0 to {has - 1}; {last} is out of range.",
            f"Choose blocks within 0:{has}.",
        )


def node_identity(options: NodeOptions, machine: Machine) -> AbstractContextManager[Identity]:
    """The key a node runs under: a client that names no file gets a fresh one."""
    if machine.identity is not None:
        return nullcontext(machine.identity)
    if options.identity is None and not options.serves:
        return nullcontext(new_identity())
    return acquire_identity(options.identity)
