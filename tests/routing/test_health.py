import pytest

from petalnode.errors import (
    LocalProtocolError,
    NoRoute,
    PeerGone,
    PeerMisbehaved,
    PeerRefused,
    PeerUnreachable,
)
from petalnode.routing import health
from petalnode.routing.health import BAN_S, FADE_S, MAX_BAN_S, PeerHealth


def test_a_failure_bans_at_once_and_for_a_while() -> None:
    peers = PeerHealth()
    assert peers.note(PeerGone("It went.", "", "alice"), 100.0)
    assert peers.banned(100.0) == {"alice": "banned for 5 s more: its connection was lost"}
    assert peers.banned(103.2) == {"alice": "banned for 2 s more: its connection was lost"}
    assert peers.banned(100.0 + BAN_S) == {}


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PeerUnreachable("x", "", "alice"), "it could not be reached"),
        (PeerMisbehaved("x", "", "alice"), "it broke the protocol"),
    ],
)
def test_the_reason_is_told(error: Exception, why: str) -> None:
    peers = PeerHealth()
    assert peers.note(error, 0.0)
    assert peers.banned(0.0)["alice"].endswith(why)


@pytest.mark.parametrize(
    "error",
    [
        PeerRefused("busy", "full", "alice"),
        LocalProtocolError("our fault"),
        NoRoute("none"),
        ValueError("a bug of ours"),
        PeerGone("nobody knows who", "", ""),
    ],
)
def test_refusals_and_our_own_errors_are_never_punished(error: Exception) -> None:
    peers = PeerHealth()
    assert not peers.note(error, 0.0)
    assert peers.banned(0.0) == {}
    assert peers.strikes("alice", 0.0) == 0


def test_bans_double_up_to_a_limit() -> None:
    peers, now, lengths = PeerHealth(), 0.0, []
    for _ in range(9):
        peers.failed("alice", now, "it failed")
        start = now
        while peers.banned(now):
            now += 1.0
        lengths.append(now - start)
    assert lengths == [5, 10, 20, 40, 80, 160, 320, 600, 600]
    assert lengths[-1] == MAX_BAN_S


def test_failures_during_a_ban_are_one_failure() -> None:
    peers = PeerHealth()
    for now in (0.0, 1.0, 2.0):
        peers.failed("alice", now, "it failed")
    assert peers.strikes("alice", 2.0) == 1
    assert peers.banned(BAN_S) == {}


def test_strikes_fade() -> None:
    peers = PeerHealth()
    peers.failed("alice", 0.0, "it failed")
    peers.failed("alice", 5.0, "it failed")
    end = 15.0
    assert peers.strikes("alice", end + FADE_S - 1) == 2
    assert peers.strikes("alice", end + FADE_S) == 1
    peers.failed("alice", end + FADE_S, "it failed")
    assert peers.strikes("alice", end + FADE_S) == 2
    peers.banned(end + 5 * FADE_S)
    assert peers.strikes("alice", end + 5 * FADE_S) == 0


def test_success_forgives() -> None:
    peers = PeerHealth()
    peers.failed("alice", 0.0, "it failed")
    peers.failed("alice", 10.0, "it failed")
    peers.succeeded("alice")
    assert peers.banned(11.0) == {}
    peers.failed("alice", 12.0, "it failed")
    assert peers.banned(12.0 + BAN_S) == {}


def test_the_number_of_bans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_PEERS", 3)
    peers = PeerHealth()
    peers.failed("worst", 0.0, "it failed")
    peers.failed("worst", 5.0, "it failed")
    for i in range(5):
        peers.failed(f"p{i}", 6.0 + i, "it failed")
    assert set(peers.banned(10.0)) == {"worst", "p3", "p4"}


def test_an_early_release_ends_the_ban_and_keeps_the_strike() -> None:
    peers = PeerHealth()
    peers.failed("alice", 100.0, "x")
    peers.released("alice", 101.0)
    peers.released("nobody", 101.0)
    assert peers.banned(101.0) == {}
    peers.failed("alice", 102.0, "x")
    assert peers.banned(102.0) == {"alice": "banned for 10 s more: x"}
