"""A long cable: forwards TCP to a local port, every byte some time later, at any rate.

    python -m benchmarks.relay PORT DELAY_S        says {"port": its own}, runs until interrupted

The delay is each way. A timer of the kernel wakes up to a millisecond late, so judge by round trips
that are measured through the relay, not by twice the delay.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from functools import partial

import trio

READ_BYTES = 256 * 1024
UNDER_WAY_CHUNKS = 1 << 16
"""Far more than any delay here lets pile up; a bound all the same."""


async def serve(port: int, delay_s: float) -> None:
    """Forward every connection to ``port``."""

    async def handle(near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", port)
        for stream in (near, far):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(one_way, near, far, delay_s, nursery)
            nursery.start_soon(one_way, far, near, delay_s, nursery)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        print(json.dumps({"port": listeners[0].socket.getsockname()[1]}), flush=True)


async def one_way(
    source: trio.SocketStream, target: trio.SocketStream, delay_s: float, pair: trio.Nursery
) -> None:
    """One direction of a cable; when it ends, both do."""
    put, take = trio.open_memory_channel[tuple[float, bytes]](UNDER_WAY_CHUNKS)
    pair.start_soon(deliver, take, target, pair)
    try:
        while chunk := await source.receive_some(READ_BYTES):
            await put.send((trio.current_time() + delay_s, bytes(chunk)))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    put.close()


async def deliver(
    under_way: trio.MemoryReceiveChannel[tuple[float, bytes]],
    target: trio.SocketStream,
    pair: trio.Nursery,
) -> None:
    """Hand over each chunk when it is due."""
    try:
        async for due, chunk in under_way:
            await trio.sleep_until(due)
            await target.send_all(chunk)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    pair.cancel_scope.cancel()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its processes itself
    trio.run(serve, int(sys.argv[1]), float(sys.argv[2]))
