"""A node: one machine's part in one model's swarm. ``open_node`` is the way in.

    async with open_node("demo", NodeOptions(join=("pn1:…",))) as node:
        async with node.open_session() as session:
            async for token in session.generate("def fibonacci(n):"):
                print(token.text, end="")

Nursery nesting is shutdown order: host > gossip > node > sessions. Leaving the context says goodbye
to the swarm, closes sessions, then gossip, then the host.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import AsyncIterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import trio

from petalnode.compute import ComputeThread
from petalnode.errors import NoRoute, PeerError, UsageError
from petalnode.events import Draining, HopInfo, Listening, Ready, Report, Route, ignore
from petalnode.joining import join_swarm, known_network, parse_joins, public_name
from petalnode.models.checkpoint import Checkpoint, open_checkpoint
from petalnode.models.client import ClientParts
from petalnode.models.devices import pick_device, pick_dtype
from petalnode.models.loading import load_client
from petalnode.models.tokenizer import Tokenizer
from petalnode.nurseries import plain_errors
from petalnode.p2p.frames import FrameStream
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import Identity, acquire_identity, new_identity
from petalnode.p2p.invite import Invite
from petalnode.p2p.memory import memory_frame_pair
from petalnode.protocol import HOP_PROTOCOL
from petalnode.routing.announcement import (
    MAX_ADDRS,
    MAX_KV_TOKENS,
    MAX_NAME_BYTES,
    Announcement,
    State,
)
from petalnode.routing.chain import Hop
from petalnode.routing.placement import choose_window
from petalnode.serving.service import SpanService, Throughput, blocks_that_fit, load_service
from petalnode.session.chain import Chain, open_chain
from petalnode.session.session import Session
from petalnode.swarm import TTL_S, Swarm, open_swarm

MAX_CHAINS_TRIED = 4
"""Chains that a session tries when hops refuse or cannot be reached."""
DRAIN_DEADLINE_S = 60.0
"""How long a draining node waits for its sessions to end."""
GOODBYE_DEADLINE_S = 1.0


@dataclass(frozen=True)
class NodeOptions:
    """How a node takes part. By default it is a client: holds no blocks, listens nowhere.

    ``blocks`` pins the span; ``num_blocks`` chooses the least covered span of that size, ``None``
    of as many blocks as fit the free memory. ``identity`` is a key file; a serving node without one
    uses the default file, a client a fresh key. ``port`` 0 takes any free one.
    """

    join: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None
    num_blocks: int | None = 0
    device: str = "auto"
    dtype: str = "auto"
    kv_tokens: int | None = None
    host: str = "0.0.0.0"
    port: int = 0
    announce: tuple[str, ...] = ()
    name: str = ""
    identity: Path | None = None

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for what no node can do."""
        if self.blocks is not None and not 0 <= self.blocks[0] < self.blocks[1]:
            raise UsageError(f"{self.blocks} is not a range of blocks.", "Give start < end.")
        if (self.num_blocks or 0) < 0 or not 1 <= (self.kv_tokens or 1) <= MAX_KV_TOKENS:
            raise UsageError("A number of blocks or tokens is out of range.", "Check the options.")
        if len(self.name.encode()) > MAX_NAME_BYTES or not self.name.isprintable():
            raise UsageError(
                f"The name is not printable text of at most {MAX_NAME_BYTES} bytes.",
                "Choose a shorter, plainer one.",
            )
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise UsageError(
                f"The host {self.host!r} is not an IP address.",
                "Use one of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them.",
            ) from None

    @property
    def serves(self) -> bool:
        """Whether the node holds blocks."""
        return self.blocks is not None or self.num_blocks != 0

    @property
    def listen(self) -> tuple[str, ...]:
        """Multiaddrs to listen on: none for a client, which only dials."""
        if not self.serves:
            return ()
        kind = "ip6" if ":" in self.host else "ip4"
        return (f"/{kind}/{self.host}/tcp/{self.port}",)


class Node:
    """An open node. Made by ``open_node``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: NodeOptions,
        host: Host,
        swarm: Swarm,
        nursery: trio.Nursery,
        device: torch.device,
        report: Report,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.swarm = swarm
        self.service: SpanService | None = None
        self._host = host
        self._nursery = nursery
        self._report = report
        self._compute = ComputeThread()
        self._device = device
        self._dtype = pick_dtype(options.dtype, checkpoint.config.dtype, self._device)
        self._blocks: tuple[int, int] | None = None
        self._state: State = "joining"
        self._seq = time.time_ns() // 1000
        self._client: ClientParts | None = None
        self._tokenizer: Tokenizer | None = None
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
        return self._blocks

    @property
    def invite(self) -> str:
        """A string that lets another machine join this swarm through this node."""
        return make_invite(self._host, self.checkpoint, self.swarm.network)

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A stream to a peer, or, without any network, to this node's own hop server."""
        if peer_id != self.peer_id:
            return await self._host.open_stream(peer_id, protocol)
        ours, theirs = memory_frame_pair(self.peer_id, self.peer_id)
        self._nursery.start_soon(self._serve_local, theirs)
        return ours

    @asynccontextmanager
    async def open_session(self, report: Report = ignore) -> AsyncIterator[Session]:
        """A session over the best chain there is now; leaving it frees its caches everywhere.

        Waits for blocks that nobody serves, with a reason and a deadline. Raises ``NoRoute``, or
        what the last chain tried failed with.
        """
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._load_client)
                await self.swarm.wait_covered(report)
                await self.swarm.probe()
        assert self._client is not None
        assert self._tokenizer is not None
        async with AsyncExitStack() as stack:
            chain = await self._open_chain(stack, report)
            yield Session(chain, self._client, self._tokenizer, self._compute)

    async def drain(self) -> None:
        """Take no new sessions, tell the swarm, wait until those here end or the deadline."""
        if self.service is None:
            return
        self.service.server.draining = True
        self._report(Draining(self.service.server.sessions))
        await self._publish("draining")
        with trio.move_on_after(DRAIN_DEADLINE_S):
            await self.service.server.wait_idle()

    async def _open_chain(self, stack: AsyncExitStack, report: Report) -> Chain:
        refused: dict[str, PeerError] = {}
        while True:
            try:
                hops = self.swarm.find_chain(exclude=refused)
            except NoRoute:
                if refused:  # there was a chain, but it said no: that is what to tell
                    raise next(reversed(refused.values())) from None
                raise
            try:
                chain = await stack.enter_async_context(self._chain(hops))
            except PeerError as error:
                self.swarm.note_failure(error)
                if error.peer_id in refused or len(refused) + 1 >= MAX_CHAINS_TRIED:
                    raise
                refused[error.peer_id] = error
                continue
            report(Route([hop_info(hop) for hop in hops]))
            return chain

    def _chain(self, hops: tuple[Hop, ...]) -> AbstractAsyncContextManager[Chain]:
        addrs = {a.peer_id: a.addrs for a in self.swarm.live()}
        for peer_id, known in addrs.items():
            self._host.learn(peer_id, known)
        return open_chain(
            self,
            hops,
            fingerprint=self.checkpoint.fingerprint,
            hidden_size=self.checkpoint.config.hidden_size,
            addrs=addrs,
        )

    async def _load_client(self) -> None:
        """Embeddings, norm, head and tokenizer, once."""
        async with self._loading_client:
            if self._client is None:
                self._tokenizer = self.checkpoint.tokenizer()
                self._client = await self._compute.run(
                    partial(load_client, self.checkpoint, dtype=self._dtype, device=self._device)
                )

    async def _serve(self) -> None:
        """Choose a span, load it, and serve it until the node closes."""
        self._blocks = self._choose_blocks()
        await self._publish("joining")
        self.service = await load_service(
            self.checkpoint,
            self._blocks,
            dtype=self._dtype,
            device=self._device,
            kv_tokens=self.options.kv_tokens,
            compute=self._compute,
            connect=self._connect,
            report=self._report,
        )
        self._nursery.start_soon(self.service.engine.serve)
        self._host.serve(HOP_PROTOCOL, self.service.server.handle)
        await self._publish("online")
        self._nursery.start_soon(self.swarm.beat, self._announcement)
        throughput = {
            "decode": self.service.throughput.decode,
            "forward": self.service.throughput.forward,
        }
        name, memory = self.checkpoint.name, self.service.memory()
        self._report(Ready(self.peer_id, self._blocks, name, throughput, memory))

    def _choose_blocks(self) -> tuple[int, int]:
        config = self.checkpoint.config
        if self.options.blocks is not None:
            return self.options.blocks
        size = self.options.num_blocks or blocks_that_fit(config, self._dtype, self._device)
        return choose_window(self.swarm.others(), config.num_blocks, size)

    async def _connect(self, peer_id: str, addrs: tuple[str, ...], protocol: str) -> FrameStream:
        self._host.learn(peer_id, addrs)
        return await self.open_stream(peer_id, protocol)

    async def _serve_local(self, stream: FrameStream) -> None:
        """What the host does for streams from outside: an error costs that stream alone."""
        try:
            if self.service is not None:
                await self.service.server.handle(stream)
        except (PeerError, trio.TooSlowError):
            pass
        finally:
            stream.reset()

    async def _publish(self, state: State) -> None:
        self._state = state
        await self.swarm.publish(self._announcement())

    def _announcement(self) -> Announcement:
        """What this node says about itself now; each call takes a new sequence number."""
        assert self._blocks is not None
        self._seq += 1
        service = self.service
        throughput = service.throughput if service else Throughput()
        return Announcement(
            peer_id=self.peer_id,
            name=self.options.name,
            fingerprint=self.checkpoint.fingerprint,
            start=self._blocks[0],
            end=self._blocks[1],
            state=self._state,
            decode_tps=throughput.decode,
            forward_tps=throughput.forward,
            kv_tokens_free=service.budget.tokens_free if service else 0,
            queue_depth=service.engine.queue_depth if service else 0,
            dtype=str(self._dtype).removeprefix("torch."),
            max_context=self.checkpoint.config.max_positions,
            addrs=self._host.addrs[:MAX_ADDRS],
            seq=self._seq,
            issued_at=time.time(),
            ttl_s=TTL_S,
        )

    async def _say_goodbye(self) -> None:
        if self._blocks is None:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_DEADLINE_S):
            await self._publish("offline")


def make_invite(host: Host, checkpoint: Checkpoint, network: str) -> str:
    """The invite that names ``host`` as contact."""
    name, fingerprint = public_name(checkpoint), checkpoint.fingerprint
    return Invite(network, name, fingerprint, host.addrs[:MAX_ADDRS]).encode()


def hop_info(hop: Hop) -> HopInfo:
    """A hop as events show it."""
    rtt_ms = None if hop.rtt_s is None else hop.rtt_s * 1000
    return HopInfo(hop.peer_id, (hop.start, hop.end), rtt_ms)


@asynccontextmanager
async def open_node(
    model: str | Checkpoint, options: NodeOptions | None = None, report: Report = ignore
) -> AsyncIterator[Node]:
    """Join or found the swarm of ``model`` (MODEL as on the command line, or an open checkpoint).

    A serving node is ready when the body starts. Raises ``ModelError``, ``UsageError``,
    ``ListenError``, ``SwarmMismatch`` or ``PeerUnreachable``. ``report`` gets what happens.
    """
    options = options or NodeOptions()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    check_blocks(checkpoint, options)
    device = pick_device(options.device)
    joins = parse_joins(options.join)
    network = known_network(joins, checkpoint)
    with plain_errors():
        async with AsyncExitStack() as stack:
            identity = stack.enter_context(node_identity(options))
            host = await stack.enter_async_context(
                open_host(identity, listen=options.listen, announce=options.announce)
            )
            if network is not None and options.serves:
                report(listening(host, checkpoint, network))
            joined = await join_swarm(host, joins, network, checkpoint.fingerprint)
            if network is None and options.serves:
                report(listening(host, checkpoint, joined.network))
            swarm = await stack.enter_async_context(open_swarm(host, identity, checkpoint, joined))
            nursery = await stack.enter_async_context(trio.open_nursery())
            node = Node(checkpoint, options, host, swarm, nursery, device, report)
            nursery.start_soon(swarm.keep_mesh)
            try:
                if options.serves:
                    await node._serve()
                yield node
            finally:
                await node._say_goodbye()
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


def node_identity(options: NodeOptions) -> AbstractContextManager[Identity]:
    """The key a node runs under: a client that names no file gets a fresh one."""
    if options.identity is None and not options.serves:
        return nullcontext(new_identity())
    return acquire_identity(options.identity)


def listening(host: Host, checkpoint: Checkpoint, network: str) -> Listening:
    """The event that tells where this node can be reached."""
    return Listening(host.peer_id, host.addrs, make_invite(host, checkpoint, network))
