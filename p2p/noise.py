"""Noise: the handshake is libp2p's, what follows it is ours.

The XX handshake and the check of the peer's identity are py-libp2p's ``PatternXX``. The transport
phase is written for throughput and is the same on the wire: everything the kernel has is read at
once and every complete message in it decrypted in one go; everything to be sent is sealed side by
side and given to the kernel in one call. Working memory is shared by all connections of a host,
because no step that uses it waits half-way; a connection keeps only a cut-off message.

    u16 length | ciphertext | 16 bytes tag          plaintext at most 65,519 bytes a message
"""

from __future__ import annotations

import struct
from typing import Any, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.patterns import PatternXX
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr

from petalnode.errors import PeerGone, PeerMisbehaved
from petalnode.p2p.wire import WOULD_BLOCK, Wire

NOISE_PROTOCOL = "/noise"
TAG_BYTES = 16
MAX_MESSAGE_BYTES = 65535
MAX_PLAIN_BYTES = MAX_MESSAGE_BYTES - TAG_BYTES
READ_BYTES = 256 * 1024
# What is sealed before it is given to the kernel: two full messages.
BATCH_BYTES = 2 * (2 + MAX_MESSAGE_BYTES)
_NONCE = struct.Struct("<4xQ")

Buffer = bytes | bytearray | memoryview


class Scratch:
    """Working memory of one host: 0.8 MB, however many connections it has."""

    def __init__(self) -> None:
        size = READ_BYTES + 2 + MAX_MESSAGE_BYTES
        self.cipher = memoryview(bytearray(size))
        self.plain = memoryview(bytearray(size))
        self.out = memoryview(bytearray(BATCH_BYTES))
        self.message = memoryview(bytearray(MAX_PLAIN_BYTES))


class RawPipe(IRawConnection):
    """A wire as py-libp2p's handshake and our negotiation want it: exact reads, whole writes."""

    def __init__(self, wire: Wire, is_initiator: bool, peer_id: str = "") -> None:
        self.wire = wire
        self.is_initiator = is_initiator
        self.peer_id = peer_id

    async def read_exactly(self, n: int) -> bytes:
        """The next ``n`` bytes, and not one more off the wire."""
        data = bytearray(n)
        at = 0
        while at < n:
            got = self.wire.try_receive(memoryview(data)[at:])
            if got == 0:
                raise PeerGone("The peer hung up during the handshake.", peer_id=self.peer_id)
            if got == WOULD_BLOCK:
                await self.wire.readable()
            else:
                at += got
        return bytes(data)

    async def write(self, *buffers: Buffer) -> None:
        """Send everything."""
        data = memoryview(b"".join(buffers))
        while data:
            data = data[self.wire.try_send(data) :]
            if data:
                await self.wire.writable()

    async def read(self, n: int | None = None) -> bytes:
        """For py-libp2p, which always names ``n`` during a handshake."""
        return await self.read_exactly(n or 1)

    async def close(self) -> None:
        """Close the wire."""
        self.wire.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the other end."""
        return self.wire.remote

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The other end as multiaddr."""
        return remote_multiaddrs(self.wire)

    def get_connection_type(self) -> ConnectionType:
        """Always direct."""
        return ConnectionType.DIRECT


def remote_multiaddrs(wire: Wire) -> list[Multiaddr]:
    """The other end of a wire as multiaddr, where it has an address."""
    if wire.remote is None:
        return []
    host, port = wire.remote
    return [Multiaddr(f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}")]


class NoiseSecurity:
    """Secures wires for one identity: ``secure`` is the handshake."""

    def __init__(self, key_pair: KeyPair, scratch: Scratch | None = None) -> None:
        self._key_pair = key_pair
        self._static_key = X25519PrivateKey.new()
        self._local = ID.from_pubkey(key_pair.public_key)
        self._scratch = scratch or Scratch()

    async def secure(self, pipe: RawPipe, expected: ID | None = None) -> NoiseSession:
        """Shake hands over ``pipe``; as the initiator insist on ``expected`` where it is given.

        Raises libp2p's ``HandshakeFailure`` and whatever its parsers make of hostile bytes.
        """
        pattern = PatternXX(self._local, self._key_pair.private_key, self._static_key)
        if pipe.is_initiator:
            secured = await pattern.handshake_outbound(pipe, expected)
        else:
            secured = await pattern.handshake_inbound(pipe)
        session = cast(SecureSession, secured)
        state: Any = cast(NoiseTransportReadWriter, session.conn).noise_state.noise_protocol
        return NoiseSession(
            pipe.wire,
            str(session.get_remote_peer()),
            send_key=state.cipher_state_encrypt.k,
            receive_key=state.cipher_state_decrypt.k,
            scratch=self._scratch,
            is_initiator=pipe.is_initiator,
        )


class NoiseSession:
    """The transport phase with one authenticated peer. Everything but the waits is synchronous."""

    def __init__(
        self,
        wire: Wire,
        peer_id: str,
        *,
        send_key: bytes,
        receive_key: bytes,
        scratch: Scratch,
        is_initiator: bool,
    ) -> None:
        self.wire = wire
        self.peer_id = peer_id
        self.is_initiator = is_initiator
        self.scratch = scratch
        self._seal = ChaCha20Poly1305(send_key).encrypt_into
        self._open = ChaCha20Poly1305(receive_key).decrypt_into
        self._sealed_count = 0
        self._opened_count = 0
        self._partial = b""
        self._early = bytearray()
        self._batched = 0
        self._unsent = memoryview(b"")
        self.may_have_more = False

    # Receiving

    def try_receive(self) -> memoryview | None:
        """All plaintext that has arrived, valid until the next call on this host; None for none.

        Raises PeerGone at the end, PeerMisbehaved for bytes that the peer did not seal, OSError.
        """
        cipher = self.scratch.cipher
        kept = len(self._partial)
        cipher[:kept] = self._partial
        got = self.wire.try_receive(cipher[kept : kept + READ_BYTES])
        if got == WOULD_BLOCK:
            self.may_have_more = False
            return None
        if got == 0:
            raise PeerGone(f"Peer {self.peer_id} closed the connection.", peer_id=self.peer_id)
        self.may_have_more = got == READ_BYTES
        return self._open_all(kept + got)

    def _open_all(self, end: int) -> memoryview:
        cipher, plain = self.scratch.cipher, self.scratch.plain
        at = size = 0
        try:
            while end - at >= 2:
                stop = at + 2 + (cipher[at] << 8 | cipher[at + 1])
                if stop > end:
                    break
                room = plain[size : size + max(0, stop - at - 2 - TAG_BYTES)]
                nonce = _NONCE.pack(self._opened_count)
                size += self._open(nonce, cipher[at + 2 : stop], None, room)
                self._opened_count += 1
                at = stop
        except InvalidTag:
            raise PeerMisbehaved(
                f"Peer {self.peer_id} sent bytes that it did not encrypt.", peer_id=self.peer_id
            ) from None
        self._partial = bytes(cipher[at:end])
        return plain[:size]

    async def readable(self) -> None:
        """Wait until there may be something to receive."""
        await self.wire.readable()

    # Sending: seal messages into the batch, then push the batch

    def seal(self, plain: Buffer) -> None:
        """Add one message of at most MAX_PLAIN_BYTES; the caller keeps to BATCH_BYTES."""
        out = self.scratch.out
        at = self._batched
        size = len(plain) + TAG_BYTES
        end = at + 2 + size
        out[at] = size >> 8
        out[at + 1] = size & 255
        self._seal(_NONCE.pack(self._sealed_count), plain, None, out[at + 2 : end])
        self._sealed_count += 1
        self._batched = end

    def push(self) -> None:
        """Give the batch to the kernel; what it does not take is kept, see ``blocked``."""
        end, self._batched = self._batched, 0
        sent = self.wire.try_send(self.scratch.out[:end])
        if sent < end:
            self._unsent = memoryview(bytes(self.scratch.out[sent:end]))

    @property
    def blocked(self) -> bool:
        """Whether the kernel has not taken the last batch yet: seal nothing until it has."""
        return bool(self._unsent)

    async def drain(self) -> None:
        """Wait until the kernel has taken the last batch."""
        while self._unsent:
            await self.wire.writable()
            self._unsent = self._unsent[self.wire.try_send(self._unsent) :]

    def close(self) -> None:
        """Close the wire. Never raises."""
        self.wire.close()

    # Before the muxer takes over

    async def read_exactly(self, n: int) -> bytes:
        """For the negotiation of the muxer."""
        while len(self._early) < n:
            plain = self.try_receive()
            if plain is None:
                await self.readable()
            else:
                self._early += plain
        taken = bytes(self._early[:n])
        del self._early[:n]
        return taken

    async def write(self, *buffers: Buffer) -> None:
        """For the negotiation of the muxer."""
        self.seal(b"".join(buffers))
        self.push()
        await self.drain()

    def take_early(self) -> bytes:
        """What arrived behind the negotiation: it belongs to the muxer."""
        early, self._early = bytes(self._early), bytearray()
        return early
