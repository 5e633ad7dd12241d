"""Every error petalnode raises on purpose: one small tree, importable from everywhere.

    PetalnodeError                 cause and remedy, one sentence each
    ├── UsageError                 what the caller asked for cannot be
    │   └── InviteError            the text given as an invite or address is not one
    ├── ModelError                 the checkpoint cannot be used as it is
    ├── ListenError                the listening address is not to be had
    ├── SwarmMismatch              that swarm serves another model, or is another network
    ├── NoRoute                    the live peers do not cover the model
    ├── InvalidAnnouncement        a gossip record breaks a rule (in ``routing.announcement``)
    ├── LocalProtocolError         we broke our own protocol: a bug here, no peer is to blame
    └── PeerError                  about one remote peer, named in ``peer_id``
        ├── PeerUnreachable        it cannot be dialled
        ├── PeerGone               its connection or stream ended, or it fell silent
        ├── PeerMisbehaved         it broke the protocol
        └── PeerRefused            it said no (``code``: busy, draining, ...): not a failure

Blame is in the type (the idea is h11's): routing punishes ``PeerUnreachable``, ``PeerGone`` and
``PeerMisbehaved``, never the rest. This module imports nothing but the standard library, which is
why every package may import it although it lies in ``node/``.
"""


class PetalnodeError(Exception):
    """Base of the tree. ``cause`` and ``remedy`` are one plain sentence each."""

    usual_remedy = ""
    """What to do when whoever raises it knows nothing better."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        remedy = remedy or self.usual_remedy
        super().__init__(f"{cause} {remedy}".strip())
        self.cause = cause
        self.remedy = remedy


class UsageError(PetalnodeError):
    """The caller asked for something that cannot be."""


class InviteError(UsageError):
    """A JOIN argument is neither a valid invite nor a usable multiaddr."""


class ModelError(PetalnodeError):
    """The checkpoint is missing, damaged, or of a kind that petalnode does not run."""


class ListenError(PetalnodeError):
    """The listening address cannot be bound."""


class SwarmMismatch(PetalnodeError):
    """The contact belongs to another network or serves other weights."""


class NoRoute(PetalnodeError):
    """No chain of live peers covers the blocks in ``missing`` (block indices)."""

    def __init__(self, cause: str, remedy: str = "", missing: tuple[int, ...] = ()) -> None:
        super().__init__(cause, remedy)
        self.missing = missing


class LocalProtocolError(PetalnodeError):
    """We broke our own protocol. No peer is to blame."""

    usual_remedy = "This is a fault of petalnode: please report it with the log."


class PeerError(PetalnodeError):
    """Something about the remote peer ``peer_id`` (base58, or "" while unknown)."""

    def __init__(self, cause: str, remedy: str = "", peer_id: str = "") -> None:
        super().__init__(cause, remedy)
        self.peer_id = peer_id


class PeerUnreachable(PeerError):
    """None of the peer's addresses answered in time."""

    usual_remedy = "Check that it is running, and that a firewall lets its port through."


class PeerGone(PeerError):
    """The peer's connection or stream ended, or the peer fell silent past a deadline."""

    usual_remedy = "Try again; `petalnode status` shows who answers."


class PeerMisbehaved(PeerError):
    """The peer sent what the protocol forbids."""

    usual_remedy = "It may run another version: try again without it."


class PeerRefused(PeerError):
    """The peer said no, for the reason in ``code``. A refusal is not a failure."""

    usual_remedy = "Try again later, or start another node for these blocks."

    def __init__(self, cause: str, remedy: str = "", peer_id: str = "", code: str = "") -> None:
        super().__init__(cause, remedy, peer_id)
        self.code = code
