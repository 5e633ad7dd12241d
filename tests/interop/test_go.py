"""Streams both ways and gossip with go-libp2p: the wire is plain libp2p."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import torch
import trio
from libp2p.custom_types import TProtocol
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from petalnode.p2p.frames import FrameStream, encode
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import new_identity

from .go_daemon import GoDaemon, open_go_daemon, receive_exactly, receive_message

ECHO, TOPIC = "/test/echo/1", "petalnode/1/interop/words"


async def echo(stream: FrameStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame.header, frame.tensors)


@asynccontextmanager
async def open_both() -> AsyncIterator[tuple[Host, GoDaemon]]:
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            go = await stack.enter_async_context(open_go_daemon())
            host = open_host(new_identity(), listen=["/ip4/127.0.0.1/tcp/0"])
            yield await stack.enter_async_context(host), go


async def test_go_opens_a_stream_to_us() -> None:
    message = b"".join(encode({"n": 1}, [torch.arange(1_000_000, dtype=torch.float32)]))
    async with open_both() as (ours, go):
        ours.serve(ECHO, echo)
        await go.connect(ours.addrs[0])
        stream = await go.open_stream(ours.peer_id, ECHO)
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, message)
            assert await receive_exactly(stream, len(message)) == message
        assert ours.connected_peers() == [go.peer_id]
        assert (await ours.ping(go.peer_id)) < 1


async def test_we_open_a_stream_to_go() -> None:
    async def behind_go(stream: trio.SocketStream) -> None:
        async with stream:
            await receive_message(stream)  # who has opened it
            while part := await stream.receive_some():
                await stream.send_all(part)

    x_T = torch.arange(1_000_000, dtype=torch.float32)
    async with open_both() as (ours, go), trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, behind_go, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        await go.handle(ECHO, listener.socket.getsockname()[1])
        assert await ours.connect(go.addrs[0]) == go.peer_id
        stream = await ours.open_stream(go.peer_id, ECHO)
        async with trio.open_nursery() as sending:
            sending.start_soon(stream.send, {"n": 1}, [x_T])
            answer = await stream.receive()
        assert answer is not None
        assert torch.equal(answer.tensors[0], x_T)
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_gossip_with_go() -> None:
    async with open_both() as (ours, go):
        router = GossipSub(
            [TProtocol("/meshsub/1.1.0")],
            6,
            4,
            12,
            heartbeat_initial_delay=0.1,
            heartbeat_interval=1,
        )
        pubsub = Pubsub(ours.libp2p, router)
        async with background_trio_service(pubsub), background_trio_service(router):
            await pubsub.wait_until_ready()
            incoming = await pubsub.subscribe(TOPIC)
            at_go = await go.subscribe(TOPIC)
            await go.connect(ours.addrs[0])
            await trio.sleep(2.5)
            await go.publish(TOPIC, b"from go")
            assert (await incoming.get()).data == b"from go"
            await pubsub.publish(TOPIC, b"from us")
            words = set()
            while b"from us" not in words:
                words.add(bytes((await receive_message(at_go))[2][0]))  # type: ignore[arg-type]
            await at_go.aclose()
