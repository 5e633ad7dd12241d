"""The record a node gossips about itself, and what makes one acceptable.

An ``Announcement`` that breaks a limit cannot be constructed, here or from the wire: the same
checks run in both places. Who signed it is not checked here (``p2p.envelope`` does), nor whether
the span fits the model (``SwarmView`` does). Peer ids are opaque text to this package.

A node that holds no blocks has nothing to announce, so an empty span is refused.
Fields that a newer version adds to the wire form are ignored; of missing ones, those that say
nothing usual (``OPTIONAL``) have their default, and the others are refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from petalnode.errors import PetalnodeError

State = Literal["joining", "online", "draining", "offline"]

PROTOCOL_VERSION = 1
MAX_BLOCKS = 4096  # no model is deeper
MAX_NAME_BYTES = 64
MAX_ADDRS = 8
MAX_ADDR_CHARS = 192
MAX_ADAPTERS = 8
MAX_ADAPTER_CHARS = 96
MAX_RTTS = 16
MAX_RTT_S = 60.0
MAX_TPS = 1e8
MIN_RATE = 1e-6  # tokens or bytes a second: the inverse of less is infinite to routing
MAX_KV_TOKENS = 1 << 48
MAX_QUEUE_DEPTH = 1_000_000
MAX_CONTEXT = 1 << 30
MIN_TTL_S = 1.0
MAX_TTL_S = 86_400.0  # three beats of a node in a swarm of ten thousand, see ``beats``
MAX_BANDWIDTH = 1e12
RTT_KEY_CHARS = 10
MAX_CLOCK_SKEW_S = 60.0  # by how much the clocks of two honest machines may differ

_STATES = frozenset(get_args(State))
_PEER_ID = re.compile(r"[A-Za-z0-9]{1,64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_TAG = re.compile(r"[a-z0-9_-]{1,16}")  # dtype and quantization names


Kind = Literal[
    "forged", "replayed", "oversize", "far-future", "zero", "nan", "out-of-range", "malformed"
]
"""What was tried, whatever the field."""
_KINDS: dict[str, Kind] = {
    "signature": "forged",
    "signer": "forged",
    "publisher": "forged",
    "echo": "forged",
    "stale": "replayed",
    "expired": "replayed",
    "size": "oversize",
    "future": "far-future",
}


class InvalidAnnouncement(PetalnodeError):
    """The record breaks a rule. ``reason`` is a short code to count by, mostly the field's name."""

    def __init__(self, reason: str, detail: str, kind: Kind | None = None) -> None:
        super().__init__(f"The announcement is refused ({reason}): {detail}.")
        self.reason = reason
        self.kind: Kind = kind or refusal_kind(reason)


def refusal_kind(reason: str) -> Kind:
    """What kind of refusal a reason is, also an outcome of ``SwarmView.apply`` such as "stale"."""
    return _KINDS.get(reason, "malformed")


@dataclass(frozen=True)
class Announcement:
    """What one node says about itself.

    The span is blocks ``[start, end)``. ``decode_tps`` and ``forward_tps`` are tokens per second
    through the whole span, measured; ``kv_tokens_free`` counts tokens that still fit the cache.
    ``seq`` rises with every record of the peer, also across restarts. ``issued_at`` is the issuer's
    wall clock (unix seconds), ``ttl_s`` how long the record may live after it was received.
    ``rtts`` maps peer ids, or their ``rtt_key``, to measured round trips in seconds. ``addrs`` are
    multiaddrs that end in ``/p2p/<peer_id>``. ``bandwidth`` is bytes per second as measured on real
    transfers, 0 while none was. ``moving_to`` is the span that the node is about to serve instead,
    None if it stays; ``pinned`` says that its owner chose the span. Raises InvalidAnnouncement.
    """

    peer_id: str
    name: str
    fingerprint: str
    start: int
    end: int
    state: State
    decode_tps: float
    forward_tps: float
    kv_tokens_free: int
    queue_depth: int
    dtype: str
    max_context: int
    addrs: tuple[str, ...]
    seq: int
    issued_at: float
    ttl_s: float
    quant: str = "none"
    adapters: tuple[str, ...] = ()
    version: int = PROTOCOL_VERSION
    rtts: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    moving_to: tuple[int, int] | None = None
    pinned: bool = False

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_span(self)
        _check_capacity(self)
        _check_lists(self)
        _check_rtts(self.rtts)
        check_integer("seq", self.seq, 1, (1 << 63) - 1)
        check_number("issued_at", self.issued_at, 0.0, 1e12)
        check_number("ttl_s", self.ttl_s, MIN_TTL_S, MAX_TTL_S)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for any serializer; without those that are left to their default."""
        plain = {name: getattr(self, name) for name in _FIELDS}
        for name, default in OPTIONAL.items():
            if plain[name] == default:
                del plain[name]
        return {key: _plain(value) for key, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: object) -> "Announcement":
        """The record in ``plain``, which may be anything at all. Raises InvalidAnnouncement."""
        if not isinstance(plain, Mapping):
            raise InvalidAnnouncement("malformed", "it is not a mapping")
        missing = [name for name in _FIELDS if name not in plain and name not in OPTIONAL]
        if missing:
            raise InvalidAnnouncement("malformed", f"fields are missing: {', '.join(missing)}")
        values = {name: plain[name] for name in _FIELDS if name in plain}
        for name in _TUPLES:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)


_FIELDS = tuple(item.name for item in fields(Announcement))
_TUPLES = ("addrs", "adapters", "moving_to")
OPTIONAL: Mapping[str, object] = {
    "adapters": (),
    "rtts": {},
    "bandwidth": 0.0,
    "moving_to": None,
    "pinned": False,
}
"""Fields that need not be on the wire, and what they are then."""


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def rtt_key(peer_id: str) -> str:
    """The end of a peer id, by which ``rtts`` name it in a fifth of the bytes.

    58 bits of a hash: nobody finds a key pair that shares them with a given peer.
    """
    return peer_id[-RTT_KEY_CHARS:]


def check_clock(announcement: Announcement, wall_now: float) -> None:
    """Refuse a record from the future, or one that has outlived its life, give or take the skew.

    ``wall_now`` is unix seconds. This only bounds replays: how long an accepted record lives is
    counted on the receiver's own monotonic clock. Raises InvalidAnnouncement.
    """
    age = wall_now - announcement.issued_at
    if age < -MAX_CLOCK_SKEW_S:
        raise InvalidAnnouncement("future", f"it was issued {-age:.0f} s from now")
    if age > announcement.ttl_s + MAX_CLOCK_SKEW_S:
        raise InvalidAnnouncement("expired", f"it was issued {age:.0f} s ago")


def _check_identity(a: Announcement) -> None:
    check_peer_id(a.peer_id)
    if not _matches(_FINGERPRINT, a.fingerprint):
        raise InvalidAnnouncement("fingerprint", "the fingerprint is not 32 hex digits")
    # A name is printed on other people's terminals: no control characters.
    if not isinstance(a.name, str) or not a.name.isprintable():
        raise InvalidAnnouncement("name", "the name is not printable text")
    if len(a.name.encode()) > MAX_NAME_BYTES:
        raise InvalidAnnouncement("name", f"the name is longer than {MAX_NAME_BYTES} bytes")
    check_integer("version", a.version, 1, 1 << 16)


def _check_span(a: Announcement) -> None:
    if not isinstance(a.state, str) or a.state not in _STATES:
        raise InvalidAnnouncement("state", "the state is not one of " + ", ".join(sorted(_STATES)))
    check_integer("start", a.start, 0, MAX_BLOCKS - 1, reason="span")
    check_integer("end", a.end, a.start + 1, MAX_BLOCKS, reason="span")
    if type(a.pinned) is not bool:
        raise InvalidAnnouncement("pinned", "pinned is neither true nor false")
    if a.moving_to is None:
        return
    if not isinstance(a.moving_to, tuple) or len(a.moving_to) != 2:
        raise InvalidAnnouncement("span", "moving_to is not a pair of blocks")
    start, end = a.moving_to
    check_integer("moving_to", start, 0, MAX_BLOCKS - 1, reason="span")
    check_integer("moving_to", end, start + 1, MAX_BLOCKS, reason="span")


def _check_capacity(a: Announcement) -> None:
    for name in ("decode_tps", "forward_tps"):
        value = getattr(a, name)
        check_number(name, value, MIN_RATE, MAX_TPS, reason="throughput")
    check_integer("kv_tokens_free", a.kv_tokens_free, 0, MAX_KV_TOKENS)
    check_integer("queue_depth", a.queue_depth, 0, MAX_QUEUE_DEPTH)
    check_integer("max_context", a.max_context, 1, MAX_CONTEXT)
    check_number("bandwidth", a.bandwidth, 0.0, MAX_BANDWIDTH)
    if 0 < a.bandwidth < MIN_RATE:
        raise InvalidAnnouncement("bandwidth", "bandwidth is next to nothing", "out-of-range")
    for name in ("dtype", "quant"):
        if not _matches(_TAG, getattr(a, name)):
            raise InvalidAnnouncement(name, f"{name} is not a short lower-case name")


def _check_lists(a: Announcement) -> None:
    _check_texts("addrs", a.addrs, MAX_ADDRS, MAX_ADDR_CHARS)
    _check_texts("adapters", a.adapters, MAX_ADAPTERS, MAX_ADAPTER_CHARS)
    for addr in a.addrs:
        # Else one peer could send everybody dialling in the name of another.
        if not addr.startswith("/") or not addr.endswith(f"/p2p/{a.peer_id}"):
            raise InvalidAnnouncement("addrs", "an address does not end in the peer's own id")


def _check_texts(name: str, values: Sequence[str], max_items: int, max_chars: int) -> None:
    if not isinstance(values, tuple) or len(values) > max_items:
        raise InvalidAnnouncement(name, f"{name} is not a list of at most {max_items}")
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= max_chars:
            raise InvalidAnnouncement(name, f"{name} holds more than text of {max_chars} letters")
        if not (value.isascii() and value.isprintable()):
            raise InvalidAnnouncement(name, f"{name} holds more than printable ASCII")


def _check_rtts(rtts: Mapping[str, float]) -> None:
    if not isinstance(rtts, Mapping) or len(rtts) > MAX_RTTS:
        raise InvalidAnnouncement("rtts", f"rtts is not a mapping of at most {MAX_RTTS}")
    for peer_id, rtt_s in rtts.items():
        if not _matches(_PEER_ID, peer_id):
            raise InvalidAnnouncement("rtts", "a peer id in rtts is not one")
        check_number("a round trip", rtt_s, 0.0, MAX_RTT_S, reason="rtts")
        if rtt_s == 0:
            raise InvalidAnnouncement("rtts", "a round trip is zero", "zero")


def check_peer_id(value: object) -> None:
    """Raise InvalidAnnouncement unless ``value`` could be a peer id."""
    if not _matches(_PEER_ID, value):
        raise InvalidAnnouncement("peer_id", "the peer id is not one")


def check_integer(name: str, value: object, low: int, high: int, reason: str = "") -> None:
    """Raise InvalidAnnouncement unless ``value`` is a whole number in ``low..high``."""
    # bool is an int to Python, and must not be one on the wire.
    if type(value) is not int:
        raise InvalidAnnouncement(reason or name, f"{name} is not a whole number")
    if not low <= value <= high:
        detail = f"{name} is not a whole number in {low}..{high}"
        raise InvalidAnnouncement(reason or name, detail, _number_kind(value))


def check_number(name: str, value: object, low: float, high: float, reason: str = "") -> None:
    """Raise InvalidAnnouncement unless ``value`` is a number in ``low..high``."""
    if type(value) not in (int, float):
        raise InvalidAnnouncement(reason or name, f"{name} is not a number")
    # The comparison also refuses NaN and the infinities.
    if not low <= value <= high:  # type: ignore[operator]
        detail = f"{name} is not a number in {low:g}..{high:g}"
        raise InvalidAnnouncement(reason or name, detail, _number_kind(value))


def _number_kind(value: object) -> Kind:
    if value != value:
        return "nan"
    return "zero" if value == 0 else "out-of-range"


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
