import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.errors import UsageError
from petalnode.p2p.identity import (
    acquire_identity,
    default_identity_path,
    is_peer_id,
    load_identity,
    new_identity,
    peer_id_of,
    verify,
)

from .records import identity

ALICE = identity(1)
SIGNED = ALICE.sign(b"hello")


def test_signs_and_verifies() -> None:
    assert verify(ALICE.peer_id, b"hello", SIGNED)
    assert not verify(ALICE.peer_id, b"hullo", SIGNED)
    assert not verify(identity(2).peer_id, b"hello", SIGNED)
    assert not verify(ALICE.peer_id, b"hello", SIGNED[:-1])


def test_is_the_same_as_libp2p_makes_of_the_key() -> None:
    from libp2p.peer.id import ID

    key_pair = ALICE.key_pair
    assert ID.from_pubkey(key_pair.public_key).to_base58() == ALICE.peer_id
    assert key_pair.private_key.sign(b"hello") == SIGNED


def test_new_identities_differ_and_seeds_repeat() -> None:
    assert new_identity().peer_id != new_identity().peer_id
    assert new_identity(b"s" * 32).peer_id == new_identity(b"s" * 32).peer_id


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(peer_id=st.text(max_size=80), signature=st.binary(max_size=70))
def test_garbage_is_false_and_never_an_error(peer_id: str, signature: bytes) -> None:
    assert not verify(peer_id, b"hello", signature)


def test_one_peer_has_one_spelling() -> None:
    assert is_peer_id(ALICE.peer_id)
    for other in (ALICE.peer_id + " ", ALICE.peer_id + "\n", "1" + ALICE.peer_id, ""):
        assert not is_peer_id(other)
    assert not is_peer_id("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")  # a hash, no key


def test_keys_of_small_order_prove_nothing() -> None:
    # y = 1 is the neutral element: for it, (R = 1, S = 0) satisfies the equation for any message.
    point = bytes([1]) + bytes(31)
    assert not verify(peer_id_of(point), b"anything", point + bytes(32))


def test_is_created_once_private_and_persistent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "node.key"
    first = load_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_identity(path).peer_id == first.peer_id
    assert [p.name for p in path.parent.iterdir()] == ["node.key"]


def test_default_lies_under_xdg_data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_identity_path() == tmp_path / "petalnode" / "identity.key"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_identity_path() == Path("/home/me/.local/share/petalnode/identity.key")


def test_second_node_with_the_same_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    with acquire_identity(path) as held:
        with pytest.raises(UsageError) as caught, acquire_identity(path):
            pass
        assert "in use by another running node" in caught.value.cause
        assert load_identity(path).peer_id == held.peer_id
    with acquire_identity(path) as again:
        assert again.peer_id == held.peer_id


def test_nodes_without_a_file_get_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with acquire_identity() as first:
        with acquire_identity() as second, acquire_identity() as third:
            assert len({first.peer_id, second.peer_id, third.peer_id}) == 3
        with acquire_identity() as again:
            assert again.peer_id == second.peer_id
    with acquire_identity() as restarted:
        assert restarted.peer_id == first.peer_id


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    program = (
        "import sys, pathlib; from petalnode.p2p.identity import acquire_identity\n"
        "with acquire_identity(pathlib.Path(sys.argv[1])) as me:\n"
        "    print(me.peer_id, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        peer_id = other.stdout.readline().strip()
        with pytest.raises(UsageError), acquire_identity(path):
            pass
        other.kill()
        other.wait()
    with acquire_identity(path) as mine:
        assert mine.peer_id == peer_id


def test_nodes_that_create_it_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: load_identity(path).peer_id, range(16)))
    assert len(set(ids)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["node.key"]


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x00" * 5000, b"-----BEGIN PRIVATE KEY-----"]
)
def test_a_file_that_is_no_key_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_identity(path)
    assert "does not hold an Ed25519 private key" in caught.value.cause
    assert caught.value.remedy
    assert path.read_bytes() == content


def test_places_that_cannot_hold_a_file_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "node.key"):
        with pytest.raises(UsageError) as caught:
            load_identity(path)
        assert str(path) in caught.value.cause


def test_is_light() -> None:
    program = (
        "import sys, petalnode.p2p.identity, petalnode.p2p.invite, petalnode.p2p.envelope\n"
        "assert not {'libp2p', 'torch', 'trio', 'multiaddr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
