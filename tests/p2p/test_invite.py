import base64
import contextlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.errors import InviteError
from petalnode.p2p.invite import Invite, _checksum, parse_join

from .records import FINGERPRINT, identity

PEER = identity(1).peer_id
ADDR = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"
INVITE = Invite("home", "org/model@main", FINGERPRINT, (ADDR, f"/dns4/a.example/tcp/1/p2p/{PEER}"))
TEXT = INVITE.encode()


def refused(text: str) -> str:
    with pytest.raises(InviteError) as caught:
        parse_join(text)
    assert caught.value.remedy
    assert caught.value.cause.count(". ") == 0
    return caught.value.cause


def forged(*fields: Any) -> str:
    body = msgpack.packb(list(fields))
    return "pn1:" + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def test_survives_the_trip() -> None:
    assert TEXT.startswith("pn1:")
    assert parse_join(TEXT) == INVITE


def test_survives_copying_out_of_a_terminal() -> None:
    wrapped = "\n".join(TEXT[i : i + 80] for i in range(0, len(TEXT), 80))
    assert parse_join(f"  {wrapped}\n") == INVITE


def test_every_typing_error_is_found() -> None:
    for position in range(4, len(TEXT)):
        letter = "A" if TEXT[position] != "A" else "B"
        assert refused(TEXT[:position] + letter + TEXT[position + 1 :])
    for cut in range(5, len(TEXT)):
        assert refused(TEXT[:cut])


def test_a_multiaddr_is_taken_as_it_is() -> None:
    for addr in (ADDR, f"/ip6/::1/tcp/1/p2p/{PEER}", f"/dns4/a.example/tcp/4001/p2p/{PEER}"):
        assert parse_join(f" {addr} ") == addr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither an invite nor an address"),
        ("hello", "neither an invite nor an address"),
        ("x" * 5000, "neither an invite nor an address"),
        ("pn1:", "damaged or incomplete"),
        ("pn1:%%%%", "letters that no invite has"),
        ("pn1:Zm9v", "damaged or incomplete"),
        ("pn2:Zm9v", "another version"),
        ("pn1:" + "A" * 5000, "longer than"),
        ("/ip4/192.0.2.7/tcp/4001", "does not end in /p2p/<peer id>"),
        (f"/p2p/{PEER}", "does not end in /p2p/<peer id>"),
        ("/ip4/192.0.2.7/tcp/4001/p2p/bob", "not the id of a peer"),
        (f"/ip4/999.0.2.7/tcp/4001/p2p/{PEER}", "not a multiaddr"),
        (f"/ip4/192.0.2.7/tcp/70000/p2p/{PEER}", "not a multiaddr"),
        (f"/nonsense/192.0.2.7/p2p/{PEER}", "not a multiaddr"),
        (f"/ip4/192.0.2.7/\x1b[2J/p2p/{PEER}", "letters that no address has"),
        (f"/dns4/{'a' * 200}/tcp/1/p2p/{PEER}", "longer than"),
    ],
)
def test_each_failure_is_one_sentence(text: str, words: str) -> None:
    assert words in refused(text)


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("home", "model", FINGERPRINT),
        ("home", "model", FINGERPRINT, ADDR),
        ("home", "model", FINGERPRINT, []),
        ("home", "model", FINGERPRINT, [ADDR] * 9),
        ("home", "model", FINGERPRINT, [7]),
        ("home", "model", FINGERPRINT, ["/ip4/192.0.2.7/tcp/4001"]),
        ("home", "model", "xyz", [ADDR]),
        ("home", 7, FINGERPRINT, [ADDR]),
        ("ho\nme", "model", FINGERPRINT, [ADDR]),
        ("x" * 257, "model", FINGERPRINT, [ADDR]),
    ],
)
def test_a_well_formed_invite_with_wrong_contents_is_refused(fields: tuple[Any, ...]) -> None:
    assert refused(forged(*fields))


def test_an_invite_that_could_not_be_parsed_is_not_made() -> None:
    with pytest.raises(InviteError):
        replace(INVITE, addrs=())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(garbage=st.binary(max_size=60))
def test_only_one_error_for_any_garbage(garbage: bytes) -> None:
    text = base64.urlsafe_b64encode(garbage + _checksum(garbage)).decode()
    with contextlib.suppress(InviteError):
        parse_join("pn1:" + text)
        raise AssertionError("garbage was believed")
