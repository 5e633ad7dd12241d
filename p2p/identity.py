"""Who a node is: an Ed25519 key, and the libp2p peer id that embeds its public half.

    peer id = base58( 00 24 | 08 01 12 20 | 32 bytes of public key )

(identity multihash of the protobuf key, libp2p's peer-id specification), so a signature can be
checked with nothing but the id. Checks are libsodium's: OpenSSL's accept keys of small order, for
which one signature fits every message. libp2p itself is imported only when a host asks for the key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import base58
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

from petalnode.errors import UsageError

if TYPE_CHECKING:
    from libp2p.crypto.keys import KeyPair

SEED_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_PEER_ID_CHARS = 64
MAX_KEY_FILE_BYTES = 4096
MAX_DEFAULT_IDENTITIES = 64  # nodes of one user on one machine that name no identity file
_PREFIX = bytes.fromhex("002408011220")


class Identity:
    """A private key and what follows from it. ``seed`` is the 32-byte Ed25519 private key."""

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.peer_id = peer_id_of(bytes(self._key.verify_key))

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @property
    def seed(self) -> bytes:
        return bytes(self._key)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature over ``data``."""
        return self._key.sign(data).signature

    @cached_property
    def key_pair(self) -> KeyPair:
        """The same key as libp2p wants it."""
        from libp2p.crypto.ed25519 import create_new_key_pair

        return create_new_key_pair(self.seed)


def new_identity(seed: bytes | None = None) -> Identity:
    """A fresh identity that is nowhere stored; the same one for the same 32-byte ``seed``."""
    return Identity(secrets.token_bytes(SEED_BYTES) if seed is None else seed)


def peer_id_of(public_key: bytes) -> str:
    """The peer id (base58 text) of a raw Ed25519 public key."""
    return base58.b58encode(_PREFIX + public_key).decode()


def is_peer_id(text: str) -> bool:
    """Whether ``text`` is the canonical id of an Ed25519 peer."""
    return _public_key(text) is not None


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` over ``data`` is that of ``peer_id``. False for garbage of any kind."""
    key = _public_key(peer_id)
    if key is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        key.verify(data, signature)
    except CryptoError:
        return False
    return True


@lru_cache(maxsize=4096)
def _public_key(peer_id: str) -> VerifyKey | None:
    if len(peer_id) > MAX_PEER_ID_CHARS:
        return None
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    key = raw[len(_PREFIX) :]
    # Encoding again refuses the spellings that decoding forgives, so that one peer has one id.
    if len(key) != KEY_BYTES or peer_id_of(key) != peer_id:
        return None
    return VerifyKey(key)


def default_identity_path(number: int = 1) -> Path:
    """Where identity ``number`` of this user lies when none is named: under XDG_DATA_HOME."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    name = "identity.key" if number == 1 else f"identity-{number}.key"
    return Path(base) / "petalnode" / name


@contextlib.contextmanager
def acquire_identity(path: Path | None = None) -> Iterator[Identity]:
    """The identity in ``path``, created on first use, ours alone while the context is open.

    Two nodes must not run under one peer id. Without a path, the first default identity that no
    live process holds is taken (identity.key, identity-2.key, ...). Raises UsageError.
    """
    if path is None:
        path, fd = _acquire_default()
    else:
        fd = _open_key_file(path)
        if not _lock(fd):
            os.close(fd)
            raise UsageError(
                f"The identity {path} is in use by another running node.",
                "Stop that node, or give this one its own with --identity FILE.",
            )
    try:
        yield _read_key(fd, path)
    finally:
        os.close(fd)  # which also ends the lock


def load_identity(path: Path | None = None) -> Identity:
    """The identity in ``path`` (default: the first), created on first use, without claiming it."""
    path = default_identity_path() if path is None else path
    fd = _open_key_file(path)
    try:
        return _read_key(fd, path)
    finally:
        os.close(fd)


def _acquire_default() -> tuple[Path, int]:
    for number in range(1, MAX_DEFAULT_IDENTITIES + 1):
        path = default_identity_path(number)
        fd = _open_key_file(path)
        if _lock(fd):
            return path, fd
        os.close(fd)
    raise UsageError(
        f"All {MAX_DEFAULT_IDENTITIES} default identities in {path.parent} are in use.",
        "Give this node its own with --identity FILE.",
    )


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: better unguarded there than not at all.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _open_key_file(path: Path) -> int:
    try:
        if not path.exists():
            _create(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"The identity file {path} cannot be used: {error.strerror}.",
            "Mend its permissions, or name another with --identity FILE.",
        ) from None


def _create(path: Path) -> None:
    """Write a new key in one step: whoever sees the file sees all of it, and the first wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(_to_pem(secrets.token_bytes(SEED_BYTES)))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _read_key(fd: int, path: Path) -> Identity:
    try:
        pem = os.read(fd, MAX_KEY_FILE_BYTES)
    except OSError as error:  # a directory opens, and fails here
        raise UsageError(
            f"The identity file {path} cannot be read: {error.strerror}.",
            "Name another with --identity FILE.",
        ) from None
    seed = _from_pem(pem)
    if seed is None:
        raise UsageError(
            f"The identity file {path} does not hold an Ed25519 private key.",
            "Restore it, or delete it to get a new identity.",
        )
    return Identity(seed)


def _to_pem(seed: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _from_pem(pem: bytes) -> bytes | None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key.private_bytes_raw() if isinstance(key, Ed25519PrivateKey) else None
