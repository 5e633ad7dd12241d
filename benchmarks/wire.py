"""The wire's speed: encrypted streams beside raw trio TCP and beside stock py-libp2p.

    python benchmarks/wire.py [--quick] [--json]

Two processes on loopback; the variants take turns, medians over the rounds are printed, so that a
busy machine weighs on all alike. Then the same wire through a relay in a third process that adds
50 ms each way and lets 100 Mbit/s through; and a 4 KiB echo with and without a bulk upload beside
it on the same connection.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

KIB, MIB = 1024, 1024 * 1024
FRAMES = {"16 KiB": 16 * KIB, "1 MiB": MIB, "32 MiB": 32 * MIB}
ECHO_BYTES, DECODE_BYTES = 16 * KIB, 4 * KIB
RELAY_DELAY_S = 0.05
RELAY_BYTES_PER_S = 100e6 / 8
WAN_BYTES = 48 * MIB
SINK, ECHO = "/bench/sink/1", "/bench/echo/1"
LENGTH = struct.Struct(">I")
READ_BYTES = 256 * KIB
# How late the relay may notice and still make up for it.
RELAY_SLACK_S = 0.005
# A router's queue, not a relay's: what lies in it delays everything alike.
RELAY_QUEUE_BYTES = 64 * KIB
SEGMENT_BYTES = 1448  # loopback's own 64 KiB would not fit that queue


# Every stream below has: send(data), receive(n) -> bytes-like of n bytes, take(n) -> nothing.


class RawStream:
    """Raw trio TCP."""

    def __init__(self, stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def receive(self, n: int) -> bytearray:
        while len(self._buffer) < n:
            part = await self._stream.receive_some(READ_BYTES)
            if not part:
                raise EOFError
            self._buffer += part
        taken = self._buffer[:n]
        del self._buffer[:n]
        return taken

    async def take(self, n: int) -> None:
        """As cheap as it gets: nothing is put together."""
        held = min(n, len(self._buffer))
        del self._buffer[:held]
        n -= held
        while n > 0:
            n -= len(await self._stream.receive_some(min(n, READ_BYTES)))


class StockStream:
    """A py-libp2p NetStream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self._stream.write(data)

    async def receive(self, n: int) -> bytearray:
        while len(self._buffer) < n:
            self._buffer += await self._stream.read(READ_BYTES)
        taken = self._buffer[:n]
        del self._buffer[:n]
        return taken

    async def take(self, n: int) -> None:
        held = min(n, len(self._buffer))
        del self._buffer[:held]
        n -= held
        while n > 0:
            n -= len(await self._stream.read(min(n, READ_BYTES)))


class OurStream:
    """petalnode's byte stream, below its frames."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def send(self, data: bytes) -> None:
        await self._stream.write(data)

    async def receive(self, n: int) -> Any:
        return await self._stream.read_exactly(n)

    async def take(self, n: int) -> None:
        await self._stream.read_exactly(n)


async def serve_sink(stream: Any) -> None:
    """Per round: u32 frame size, u32 count; then that many frames; then one byte back."""
    while True:
        size = LENGTH.unpack(await stream.receive(4))[0]
        count = LENGTH.unpack(await stream.receive(4))[0]
        for _ in range(count):
            await stream.take(size)
        await stream.send(b"k")


async def serve_echo(stream: Any) -> None:
    while True:
        prefix = await stream.receive(4)
        await stream.send(bytes(await stream.receive(LENGTH.unpack(prefix)[0])))


SERVERS = {SINK: serve_sink, ECHO: serve_echo}


async def forever(serve: Callable[[Any], Awaitable[None]], stream: Any) -> None:
    try:
        await serve(stream)
    except Exception:  # noqa: BLE001 - a benchmark's server: the client has left
        return


# Servers: one process each, which reports its address through a pipe.


def raw_server(report: Any) -> None:
    async def main() -> None:
        async def handler(stream: trio.SocketStream) -> None:
            raw = RawStream(stream)
            protocol = SINK if await raw.receive(1) == b"s" else ECHO
            await forever(SERVERS[protocol], raw)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, handler, 0)
            report.send(listeners[0].socket.getsockname()[1])

    trio.run(main)


def our_server(report: Any) -> None:
    from petalnode.p2p.identity import new_identity
    from petalnode.p2p.swarm import run_swarm

    async def main() -> None:
        async with run_swarm(new_identity(b"s" * 32).key_pair) as swarm:
            for protocol, serve in SERVERS.items():
                swarm.handlers[protocol] = lambda s, serve=serve: forever(serve, OurStream(s))
            report.send(str(swarm.bind("127.0.0.1", 0)))
            await trio.sleep_forever()

    trio.run(main)


def stock_server(report: Any) -> None:
    from libp2p.custom_types import TProtocol
    from multiaddr import Multiaddr

    async def main() -> None:
        host = stock_host(b"s" * 32)
        for protocol, serve in SERVERS.items():
            host.set_stream_handler(
                TProtocol(protocol), lambda s, serve=serve: forever(serve, StockStream(s))
            )
        async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            report.send(str(host.get_addrs()[0]))
            await trio.sleep_forever()

    trio.run(main)


def stock_host(seed: bytes) -> Any:
    """py-libp2p as it comes, but with Noise and Yamux only."""
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as new_x25519
    from libp2p.custom_types import TProtocol
    from libp2p.security.noise.transport import Transport
    from libp2p.stream_muxer.yamux.yamux import Yamux

    pair = create_new_key_pair(seed)
    noise = Transport(pair, new_x25519().private_key)
    return new_host(
        pair, sec_opt={TProtocol("/noise"): noise}, muxer_opt={TProtocol("/yamux/1.0.0"): Yamux}
    )


def relay_server(report: Any, target_port: int) -> None:
    """Forwards TCP with RELAY_DELAY_S each way and RELAY_BYTES_PER_S, like one long cable."""

    async def main() -> None:
        async def handler(near: trio.SocketStream) -> None:
            far = await trio.open_tcp_stream("127.0.0.1", target_port)
            async with near, far, trio.open_nursery() as nursery:
                nursery.start_soon(cable, near, far, nursery)
                nursery.start_soon(cable, far, near, nursery)

        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RELAY_QUEUE_BYTES)
            listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            report.send(listener.socket.getsockname()[1])
            await trio.serve_listeners(handler, [listener], handler_nursery=nursery)

    trio.run(main)


async def cable(source: Any, target: Any, nursery: trio.Nursery) -> None:
    """One direction. What is under way is bounded by the delay alone; the sender is held back to
    the rate by not reading on."""
    under_way: deque[tuple[float, bytes]] = deque()
    changed = trio.Event()

    async def deliver() -> None:
        nonlocal changed
        while True:
            while not under_way:
                changed = trio.Event()
                await changed.wait()
            due, part = under_way.popleft()
            await trio.sleep_until(due)
            await target.send_all(part)

    nursery.start_soon(deliver)
    free_at = trio.current_time()
    try:
        while part := await source.receive_some(16 * KIB):
            free_at = (
                max(free_at, trio.current_time() - RELAY_SLACK_S) + len(part) / RELAY_BYTES_PER_S
            )
            await trio.sleep_until(free_at)
            under_way.append((free_at + RELAY_DELAY_S, part))
            changed.set()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    nursery.cancel_scope.cancel()


def start(server: Callable[..., None], *args: Any) -> tuple[multiprocessing.Process, Any]:
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=server, args=(far, *args), daemon=True)
    process.start()
    far.close()
    return process, near.recv()


# Measuring


async def throughput(stream: Any, size: int, total: int) -> float:
    """MB/s of ``total`` bytes in frames of ``size``."""
    count = max(1, total // size)
    data = bytes(size)
    started = time.perf_counter()
    await stream.send(LENGTH.pack(size) + LENGTH.pack(count))
    for _ in range(count):
        await stream.send(data)
    await stream.receive(1)
    return count * size / (time.perf_counter() - started) / 1e6


async def round_trips(stream: Any, size: int, count: int) -> list[float]:
    """Seconds of each of ``count`` echoes."""
    message = LENGTH.pack(size) + bytes(size)
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        await stream.send(message)
        await stream.receive(size)
        taken.append(time.perf_counter() - started)
    return taken


async def run(args: argparse.Namespace) -> dict[str, Any]:
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    from petalnode.p2p.identity import new_identity
    from petalnode.p2p.negotiate import propose
    from petalnode.p2p.swarm import run_swarm

    servers = {"raw": raw_server, "stock": stock_server, "ours": our_server}
    addresses = {name: start(server)[1] for name, server in servers.items()}
    result: dict[str, Any] = {}
    stock = stock_host(b"c" * 32)
    async with run_swarm(new_identity(b"c" * 32).key_pair) as swarm, stock.run([]):
        started = time.perf_counter()
        connection = await swarm.dial(Multiaddr(addresses["ours"]), None)
        result["dial_ms"] = (time.perf_counter() - started) * 1e3
        info = info_from_p2p_addr(Multiaddr(addresses["stock"]))
        await stock.connect(info)

        async def ours(protocol: str, on: Any = connection) -> OurStream:
            stream = on.muxer.open_stream()
            await propose(stream, protocol)
            return OurStream(stream)

        async def raw(protocol: str) -> RawStream:
            stream = RawStream(await trio.open_tcp_stream("127.0.0.1", addresses["raw"]))
            await stream.send(b"s" if protocol == SINK else b"e")
            return stream

        async def theirs(protocol: str) -> StockStream:
            return StockStream(await stock.new_stream(info.peer_id, [TProtocol(protocol)]))

        started = time.perf_counter()
        await ours(ECHO)
        result["open_stream_ms"] = (time.perf_counter() - started) * 1e3
        variants = {"raw": raw, "stock": theirs, "ours": ours}
        await compare(args, variants, result)
        await beside_bulk(args, ours, result)
        await over_the_relay(args, swarm, ours, addresses, result)
    return result


async def compare(args: argparse.Namespace, variants: Any, result: dict[str, Any]) -> None:
    sinks = {name: await open_stream(SINK) for name, open_stream in variants.items()}
    echoes = {name: await open_stream(ECHO) for name, open_stream in variants.items()}
    rates: dict[tuple[str, str], list[float]] = {}
    trips: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for label, size in FRAMES.items():
            for name, sink in sinks.items():
                total = args.total_mib * MIB * (4 if name == "raw" else 1)
                rate = await throughput(sink, size, max(size, total))
                rates.setdefault((name, label), []).append(rate)
        for name, stream in echoes.items():
            trips[name] += await round_trips(stream, ECHO_BYTES, args.echoes)
    for name in variants:
        for label in FRAMES:
            result[f"{name}_mb_s_{label}"] = statistics.median(rates[name, label])
        result[f"{name}_echo_16_KiB_ms"] = statistics.median(trips[name]) * 1e3


async def beside_bulk(args: argparse.Namespace, ours: Any, result: dict[str, Any]) -> None:
    echo, sink = await ours(ECHO), await ours(SINK)

    def note(label: str, taken: list[float]) -> None:
        taken.sort()
        result[f"decode_{label}_p50_ms"] = taken[len(taken) // 2] * 1e3
        result[f"decode_{label}_p99_ms"] = taken[len(taken) * 99 // 100] * 1e3

    count = args.echoes * 3
    note("alone", await round_trips(echo, DECODE_BYTES, count))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(throughput, sink, MIB, 1 << 50)
        await trio.sleep(0.2)
        note("beside_bulk", await round_trips(echo, DECODE_BYTES, count))
        nursery.cancel_scope.cancel()


async def over_the_relay(
    args: argparse.Namespace,
    swarm: Any,
    ours: Any,
    addresses: dict[str, Any],
    result: dict[str, Any],
) -> None:
    from multiaddr import Multiaddr

    total = WAN_BYTES // (4 if args.quick else 1)
    _, raw_port = start(relay_server, addresses["raw"])
    raw = RawStream(await trio.open_tcp_stream("127.0.0.1", raw_port))
    await raw.send(b"s")
    result["wan_raw_mb_s"] = await throughput(raw, MIB, total)

    _, relay_port = start(relay_server, int(addresses["ours"].split("/")[-1]))
    started = time.perf_counter()
    connection = await swarm.dial(Multiaddr(f"/ip4/127.0.0.1/tcp/{relay_port}"), None)
    result["wan_dial_s"] = time.perf_counter() - started
    sink, echo = await ours(SINK, connection), await ours(ECHO, connection)
    result["wan_first_mb_s"] = await throughput(sink, MIB, total)
    rates = [await throughput(sink, MIB, total) for _ in range(1 if args.quick else 3)]
    result["wan_mb_s"] = statistics.median(rates)
    result["wan_share_of_link"] = statistics.median(rates) * 1e6 / RELAY_BYTES_PER_S
    alone = sorted(await round_trips(echo, DECODE_BYTES, 10))
    result["wan_decode_alone_ms"] = alone[5] * 1e3
    async with trio.open_nursery() as nursery:
        nursery.start_soon(throughput, sink, MIB, 1 << 50)
        await trio.sleep(1.0)
        beside = sorted(await round_trips(echo, DECODE_BYTES, 20))
        result["wan_decode_beside_bulk_ms"] = beside[10] * 1e3
        result["wan_decode_beside_bulk_worst_ms"] = beside[-1] * 1e3
        nursery.cancel_scope.cancel()


def show(result: dict[str, Any]) -> None:
    print(f"{'MB/s, one stream':<24}" + "".join(f"{label:>10}" for label in FRAMES))
    for name in ("raw", "stock", "ours"):
        row = "".join(f"{result[f'{name}_mb_s_{label}']:>10.0f}" for label in FRAMES)
        print(f"  {name:<22}{row}     16 KiB echo {result[f'{name}_echo_16_KiB_ms']:.3f} ms")
    to_raw = result["ours_mb_s_1 MiB"] / result["raw_mb_s_1 MiB"]
    to_stock = result["ours_echo_16_KiB_ms"] / result["stock_echo_16_KiB_ms"]
    print(f"  1 MiB frames, ours / raw: {to_raw:.3f} (target 0.07 or more)")
    print(f"  16 KiB echo, ours / stock: {to_stock:.2f} (target 0.6 or less)")
    for label in ("alone", "beside_bulk"):
        p50, p99 = result[f"decode_{label}_p50_ms"], result[f"decode_{label}_p99_ms"]
        print(f"4 KiB echo {label.replace('_', ' ')}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    print(
        f"100 Mbit/s at 100 ms: {result['wan_mb_s']:.2f} MB/s, "
        f"{result['wan_share_of_link']:.0%} of the link (target 90 %); "
        f"first {result['wan_first_mb_s']:.2f}, raw {result['wan_raw_mb_s']:.2f} MB/s; "
        f"dial {result['wan_dial_s']:.2f} s; 4 KiB echo "
        f"{result['wan_decode_alone_ms']:.0f} ms alone, "
        f"{result['wan_decode_beside_bulk_ms']:.0f} ms beside bulk"
    )
    print(f"dial {result['dial_ms']:.1f} ms, open stream {result['open_stream_ms']:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data, one round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.rounds, args.total_mib, args.echoes = (1, 32, 100) if args.quick else (7, 64, 200)
    result = trio.run(run, args)
    if args.json:
        json.dump(result, sys.stdout)
    else:
        show(result)


if __name__ == "__main__":
    main()
