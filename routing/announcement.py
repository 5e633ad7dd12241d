"""The record a node gossips about itself, and what makes one acceptable.

An ``Announcement`` that breaks a limit cannot be constructed, here or from the wire: the same
checks run in both places. Who signed it is not checked here (``p2p.envelope`` does), nor whether
the span fits the model (``SwarmView`` does). Peer ids are opaque text to this package.

A node that holds no blocks has nothing to announce, so an empty span is refused.
Fields that a newer version adds to the wire form are ignored; missing ones are refused.
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
MAX_KV_TOKENS = 1 << 48
MAX_QUEUE_DEPTH = 1_000_000
MAX_CONTEXT = 1 << 30
MIN_TTL_S = 1.0
MAX_TTL_S = 600.0
MAX_CLOCK_SKEW_S = 60.0  # by how much the clocks of two honest machines may differ

_STATES = frozenset(get_args(State))
_PEER_ID = re.compile(r"[A-Za-z0-9]{1,64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_TAG = re.compile(r"[a-z0-9_-]{1,16}")  # dtype and quantization names


class InvalidAnnouncement(PetalnodeError):
    """The record breaks a rule. ``reason`` is a short code to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"The announcement is refused ({reason}): {detail}.")
        self.reason = reason


@dataclass(frozen=True)
class Announcement:
    """What one node says about itself.

    The span is blocks ``[start, end)``. ``decode_tps`` and ``forward_tps`` are tokens per second
    through the whole span, measured; ``kv_tokens_free`` counts tokens that still fit the cache.
    ``seq`` rises with every record of the peer, also across restarts. ``issued_at`` is the issuer's
    wall clock (unix seconds), ``ttl_s`` how long the record may live after it was received.
    ``rtts`` maps peer ids to measured round trips in seconds. ``addrs`` are multiaddrs that end in
    ``/p2p/<peer_id>``. Raises InvalidAnnouncement.
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

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_span(self)
        _check_capacity(self)
        _check_lists(self)
        _check_rtts(self.rtts)
        _check_integer("seq", self.seq, 1, (1 << 63) - 1)
        _check_number("issued_at", self.issued_at, 0.0, 1e12)
        _check_number("ttl_s", self.ttl_s, MIN_TTL_S, MAX_TTL_S)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for any serializer."""
        plain = {name: getattr(self, name) for name in _FIELDS}
        plain["addrs"], plain["adapters"] = list(self.addrs), list(self.adapters)
        plain["rtts"] = dict(self.rtts)
        return plain

    @classmethod
    def from_dict(cls, plain: object) -> "Announcement":
        """The record in ``plain``, which may be anything at all. Raises InvalidAnnouncement."""
        if not isinstance(plain, Mapping):
            raise InvalidAnnouncement("malformed", "it is not a mapping")
        missing = [name for name in _FIELDS if name not in plain]
        if missing:
            raise InvalidAnnouncement("malformed", f"fields are missing: {', '.join(missing)}")
        values = {name: plain[name] for name in _FIELDS}
        for name in ("addrs", "adapters"):
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        return cls(**values)


_FIELDS = tuple(item.name for item in fields(Announcement))


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
    if not _matches(_PEER_ID, a.peer_id):
        raise InvalidAnnouncement("peer_id", "the peer id is not one")
    if not _matches(_FINGERPRINT, a.fingerprint):
        raise InvalidAnnouncement("fingerprint", "the fingerprint is not 32 hex digits")
    # A name is printed on other people's terminals: no control characters.
    if not isinstance(a.name, str) or not a.name.isprintable():
        raise InvalidAnnouncement("name", "the name is not printable text")
    if len(a.name.encode()) > MAX_NAME_BYTES:
        raise InvalidAnnouncement("name", f"the name is longer than {MAX_NAME_BYTES} bytes")
    _check_integer("version", a.version, 1, 1 << 16)


def _check_span(a: Announcement) -> None:
    if not isinstance(a.state, str) or a.state not in _STATES:
        raise InvalidAnnouncement("state", "the state is not one of " + ", ".join(sorted(_STATES)))
    _check_integer("start", a.start, 0, MAX_BLOCKS - 1, reason="span")
    _check_integer("end", a.end, a.start + 1, MAX_BLOCKS, reason="span")


def _check_capacity(a: Announcement) -> None:
    for name in ("decode_tps", "forward_tps"):
        value = getattr(a, name)
        _check_number(name, value, 0.0, MAX_TPS, reason="throughput")
        if value == 0:
            raise InvalidAnnouncement("throughput", f"{name} is zero")
    _check_integer("kv_tokens_free", a.kv_tokens_free, 0, MAX_KV_TOKENS)
    _check_integer("queue_depth", a.queue_depth, 0, MAX_QUEUE_DEPTH)
    _check_integer("max_context", a.max_context, 1, MAX_CONTEXT)
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
        _check_number("a round trip", rtt_s, 0.0, MAX_RTT_S, reason="rtts")
        if rtt_s == 0:
            raise InvalidAnnouncement("rtts", "a round trip is zero")


def _check_integer(name: str, value: object, low: int, high: int, reason: str = "") -> None:
    # bool is an int to Python, and must not be one on the wire.
    if type(value) is not int or not low <= value <= high:
        raise InvalidAnnouncement(reason or name, f"{name} is not a whole number in {low}..{high}")


def _check_number(name: str, value: object, low: float, high: float, reason: str = "") -> None:
    # The comparison also refuses NaN and the infinities.
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise InvalidAnnouncement(reason or name, f"{name} is not a number in {low:g}..{high:g}")


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
