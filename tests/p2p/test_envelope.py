import contextlib
import dataclasses
from dataclasses import replace

import base58
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.p2p.compact import KEYS, shorten
from petalnode.p2p.envelope import _DOMAIN, MAX_RECORD_BYTES, seal, unseal
from petalnode.p2p.identity import Identity
from petalnode.routing import announcement as limits
from petalnode.routing.announcement import Announcement, InvalidAnnouncement
from petalnode.routing.suspicion import Suspicion

from .records import identity, record

ALICE, MALLORY = identity(1), identity(2)
SEALED = seal(ALICE, record(ALICE))


def reason(envelope: bytes) -> str:
    with pytest.raises(InvalidAnnouncement) as caught:
        unseal(envelope)
    return caught.value.reason


def signed(who: Identity, body: bytes) -> bytes:
    return who.sign(_DOMAIN + body) + body


def test_survives_the_trip() -> None:
    assert unseal(SEALED) == record(ALICE)


def test_one_flipped_bit_anywhere_is_refused() -> None:
    for position in range(len(SEALED)):
        forged = bytearray(SEALED)
        forged[position] ^= 1
        assert reason(bytes(forged))


def test_a_record_about_somebody_else_is_refused() -> None:
    with pytest.raises(InvalidAnnouncement) as caught:
        seal(MALLORY, record(ALICE))
    assert caught.value.reason == "signer"
    assert reason(signed(MALLORY, msgpack.packb(record(ALICE).to_dict()))) == "signature"


def test_a_signature_made_for_another_purpose_does_not_fit() -> None:
    body = msgpack.packb(record(ALICE).to_dict())
    assert reason(ALICE.sign(body) + body) == "signature"


def test_size_is_checked_before_anything_is_decoded() -> None:
    assert reason(SEALED + bytes(MAX_RECORD_BYTES)) == "size"
    assert reason(SEALED[:64]) == "size"
    assert reason(b"") == "size"


@pytest.mark.parametrize(
    "body",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 3000,  # nested 3,000 deep
        b"\x80\x80",  # more than one object
        b"\xc1",
        b"\xa1\xff",  # not UTF-8
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x90",
    ],
)
def test_bombs_and_garbage_are_malformed(body: bytes) -> None:
    assert reason(signed(ALICE, body)) == "malformed"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(garbage=st.binary(max_size=200))
def test_only_one_error_for_any_garbage(garbage: bytes) -> None:
    with contextlib.suppress(InvalidAnnouncement):
        unseal(bytes(64) + garbage)
        raise AssertionError("garbage was believed")


def test_the_largest_record_that_the_limits_allow_fits() -> None:
    addr_tail = f"/p2p/{ALICE.peer_id}"
    largest = replace(
        record(ALICE),
        name="\U0001f338" * (limits.MAX_NAME_BYTES // 4),
        decode_tps=1.1,
        forward_tps=1.1,
        start=limits.MAX_BLOCKS - 2,
        end=limits.MAX_BLOCKS,
        state="draining",
        kv_tokens_free=limits.MAX_KV_TOKENS,
        queue_depth=limits.MAX_QUEUE_DEPTH,
        dtype="x" * 16,
        quant="x" * 16,
        max_context=limits.MAX_CONTEXT,
        addrs=("/" + "x" * (limits.MAX_ADDR_CHARS - 1 - len(addr_tail)) + addr_tail,)
        * limits.MAX_ADDRS,
        adapters=("x" * limits.MAX_ADAPTER_CHARS,) * limits.MAX_ADAPTERS,
        rtts={f"{n:x<52}": 0.123456789 for n in range(limits.MAX_RTTS)},
        seq=(1 << 63) - 1,
    )
    assert unseal(seal(ALICE, largest)) == largest


def test_is_readable_by_msgpack_of_any_language() -> None:
    known = msgpack.unpackb(SEALED[64:], strict_map_key=False)
    assert base58.b58encode(known[KEYS["peer_id"]]).decode() == ALICE.peer_id
    assert known[KEYS["addrs"]] == ["/ip4/127.0.0.1/tcp/4001"]


def test_names_in_full_are_read_as_well() -> None:
    assert unseal(signed(ALICE, msgpack.packb(record(ALICE).to_dict()))) == record(ALICE)


def test_short_form_is_short_and_has_every_field() -> None:
    in_full = msgpack.packb(record(ALICE).to_dict())
    assert len(SEALED) - 64 < 0.6 * len(in_full)
    fields = {f.name for kind in (Announcement, Suspicion) for f in dataclasses.fields(kind)}
    assert set(KEYS) == fields
    assert len(set(KEYS.values())) == len(KEYS)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("peer_id", bytes(65), "peer_id"),
        ("peer_id", b"", "peer_id"),
        ("peer_id", 7, "peer_id"),
        ("fingerprint", bytes(15), "fingerprint"),
        ("fingerprint", bytes(64), "fingerprint"),
        ("addrs", [7], "addrs"),
        ("addrs", b"/ip4", "addrs"),
        ("addrs", [""] * 9, "addrs"),
        ("seq", b"1", "seq"),
    ],
)
def test_short_forms_of_nothing_are_refused(field: str, value: object, expected: str) -> None:
    short = shorten(record(ALICE).to_dict()) | {KEYS[field]: value}
    assert reason(signed(ALICE, msgpack.packb(short))) == expected


def test_round_trips_are_whole_microseconds_where_that_is_exact() -> None:
    rtts = {"a" * 10: 0.123456, "b" * 10: 1e-6, "c" * 10: 0.1234567, "d" * 10: 60.0}
    known = record(ALICE, rtts=rtts)
    on_wire = msgpack.unpackb(seal(ALICE, known)[64:], strict_map_key=False)[KEYS["rtts"]]
    assert list(on_wire.values()) == [123456, 1, 0.1234567, 60_000_000]
    assert unseal(seal(ALICE, known)) == known
    for wrong in (-1, 0, 60_000_001, (1 << 64) - 1):
        short = shorten(known.to_dict()) | {KEYS["rtts"]: {"a": wrong}}
        assert reason(signed(ALICE, msgpack.packb(short))) == "rtts"


def test_keys_of_any_kind_and_unknown_numbers_are_left_out() -> None:
    short = shorten(record(ALICE).to_dict()) | {99: 1, -1: 2, b"x": 3, 1.5: 4, None: 5}
    assert unseal(signed(ALICE, msgpack.packb(short))) == record(ALICE)


def test_nobody_can_give_addresses_in_the_name_of_another() -> None:
    foreign = f"/ip4/1.2.3.4/tcp/1/p2p/{MALLORY.peer_id}"
    short = shorten(record(ALICE).to_dict()) | {KEYS["addrs"]: [foreign]}
    (addr,) = unseal(signed(ALICE, msgpack.packb(short))).addrs
    assert addr == f"{foreign}/p2p/{ALICE.peer_id}"
