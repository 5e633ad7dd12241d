"""What goes wrong with a hub: one sentence each, and nothing lost that was there."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from petalnode.errors import ModelError
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_client
from petalnode.models.sources import Source

from .hub_fixtures import FETCH, in_a_process, message, open_repo, shards
from .hub_server import Answer, HubServer, refusal, sha256

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def test_a_server_that_sends_too_much(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    source = open_repo(tmp_path)
    with (repo / "a.safetensors").open("ab") as file:
        file.write(b"x" * 5_000_000)
    hub.faults.refusals["a.safetensors"] = Answer(200, {}, repo / "a.safetensors")
    with pytest.raises(ModelError, match=r"broke off at .*: more than 31457\d\d bytes came"):
        source.path("a.safetensors")
    assert sum(f.stat().st_size for f in (tmp_path / "hub").rglob("*.incomplete")) <= 3 << 20


@pytest.mark.parametrize(
    ("token", "spot", "answer", "wanted"),
    [
        ("", "api", refusal(404, "RepoNotFound"), "no public repo 'org/name'.*set HF_TOKEN"),
        ("", "api", refusal(401), "no public repo 'org/name'.*set HF_TOKEN"),
        ("", "api", refusal(404, "RevisionNotFound"), "no revision 'v9'"),
        ("bad", "api", refusal(401, "", "Invalid credentials in Authorization header"), "valid"),
        ("", "api", refusal(403), "forbids access to org/name"),
        ("", "api", refusal(418), "status 418"),
        ("", "head config.json", refusal(401, "GatedRepo"), "is gated.* then set HF_TOKEN"),
        ("mine", "head config.json", refusal(403, "GatedRepo"), "is gated.*with the account"),
        ("", "a.safetensors", refusal(403, "GatedRepo"), "is gated"),
        ("bad", "a.safetensors", refusal(401), "status 401"),
        ("", "a.safetensors", refusal(500), "status 500.*downloaded is kept"),
        ("", "head a.safetensors", refusal(404, "RepoNotFound"), "no public repo"),
    ],
)
def test_one_sentence_for_each_refusal(
    hub: HubServer,
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    spot: str,
    answer: Answer,
    wanted: str,
) -> None:
    hub.add("org/name", repo, "v9")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults.refusals[spot] = answer
    with pytest.raises(ModelError, match=wanted) as caught:
        open_repo(tmp_path, "v9").path("a.safetensors")
    assert "\n" not in str(caught.value)
    assert caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize("token", ["hf_ü", "hf_\x1b[0m"])
def test_a_token_that_is_none(
    hub: HubServer, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert "(HF_TOKEN) has characters that no token has" in message("org/name", tmp_path)
    assert hub.log == []


def test_names_that_the_hub_does_not_know(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    assert "no public repo 'org/nowhere'" in message("org/nowhere", tmp_path)
    assert "no public repo 'org/na--me'" in message("org/na--me", tmp_path)
    assert "no revision 'v9'" in message("org/name", tmp_path, revision="v9")
    assert "lacks the file c.safetensors" in str(missing(open_repo(tmp_path), "c.safetensors"))


def missing(source: Source, file: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        source.fetch([file])
    return caught.value


def test_a_corrupt_download_is_thrown_away(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    hub.faults.flipped["a.safetensors"] = 2_000_000
    source = open_repo(tmp_path)
    kept = source.path("b.safetensors")
    with pytest.raises(ModelError, match=r"a.safetensors of org/name .*damaged.*start again"):
        source.path("a.safetensors")
    assert list((tmp_path / "hub").rglob("a.safetensors")) == []
    hub.faults.flipped.clear()
    hub.log.clear()
    assert source.path("a.safetensors").read_bytes() == (repo / "a.safetensors").read_bytes()
    assert source.path("b.safetensors") == kept
    assert shards(hub) == ["a.safetensors"]


@pytest.mark.parametrize("offline", [False, True])
def test_a_file_that_was_damaged_in_the_cache(
    hub: HubServer, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """Also one that other programs put there."""
    path = Path(
        huggingface_hub.hf_hub_download("org/name", "a.safetensors", cache_dir=tmp_path / "hub")
    )
    open_repo(tmp_path)
    with path.resolve().open("r+b") as file:
        file.truncate(1_000_000)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError, match=r"a.safetensors of org/name .*damaged"):
        open_repo(tmp_path).path("a.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert open_repo(tmp_path).path("a.safetensors").stat().st_size > 3_000_000


def test_no_room_is_said_before_the_download(
    hub: HubServer, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they have no room; what is here of one already needs none."""
    source, usage = open_repo(tmp_path), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4_300_000))
    both = ["a.safetensors", "b.safetensors"]
    with pytest.raises(ModelError, match=r"5\.2 MB of org/name.* 4\.3 MB free.*--cache-dir"):
        source.fetch(both)
    assert shards(hub) == []
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    partial = blobs / (sha256(repo / "a.safetensors") + ".incomplete")
    partial.write_bytes((repo / "a.safetensors").read_bytes()[:1_000_000])
    source.fetch(both)
    assert [sent.start for sent in hub.bodies(".safetensors")] == [1_000_000, 0]


def test_a_disk_that_is_full(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    """A file system of 2 MB, mounted for one process; the check beforehand is left out there."""
    small = tmp_path / "small"
    small.mkdir()
    code = FETCH.replace("None, None)", f"None, {str(small)!r})").replace(
        "source.", "source._check_room = lambda wanted: None\nsource.", 1
    )
    mount = f'mount -t tmpfs -o size=2m none {small} && exec "$@"'
    verb = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if subprocess.run([*verb, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets no process mount a file system of its own")
    with in_a_process(hub, tmp_path, [*verb, sys.executable, "-c", code]) as process:
        err = process.communicate(timeout=60)[1]
    said = err.splitlines()[-1]
    assert "org/name cannot be stored in the cache: the disk is full. Free some space" in said


def test_no_space_left(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    """/dev/full in the place of the unfinished file: every write there fails as on a full disk."""
    source = open_repo(tmp_path)
    kept = source.path("b.safetensors")
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    partial = blobs / (sha256(repo / "a.safetensors") + ".incomplete")
    partial.symlink_to("/dev/full")
    with pytest.raises(ModelError, match=r"the disk is full\. Free some space.*--cache-dir") as got:
        source.path("a.safetensors")
    cause = got.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
    partial.unlink()
    assert kept.is_file()
    assert source.path("a.safetensors").is_file()


def test_a_cache_that_cannot_be_written(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(ModelError, match="cannot be stored in the cache"):
        open_repo(tmp_path)


def test_a_hub_cannot_choose_paths(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    """What it calls a sha256 becomes the name of a file here."""
    lfs = {"sha256": "../../../../evil", "size": 3, "pointerSize": 1}
    files = [{"rfilename": "config.json"}, {"rfilename": "a.safetensors", "size": 3, "lfs": lfs}]
    info = json.dumps({"id": "org/name", "sha": "c" * 40, "siblings": files})
    hub.faults.refusals["api"] = Answer(200, {"Content-Type": "application/json"}, text=info)
    assert open_repo(tmp_path).path("a.safetensors").is_relative_to(tmp_path / "hub")
    assert not list(tmp_path.rglob("*evil*"))


def test_pickled_repo_is_not_fetched(hub: HubServer, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    raw = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 9}
    raw |= {"num_hidden_layers": 1, "intermediate_size": 8}
    (repo / "config.json").write_text(json.dumps(raw))
    (repo / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("org/name", repo)
    assert "only pickled weights (pytorch_model.bin)" in message("org/name", tmp_path)
    assert not [one for one in hub.log if one.file == "pytorch_model.bin"]
    (repo / "pytorch_model.bin").unlink()
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    with pytest.raises(ModelError, match="lacks the file model"):
        load_client(checkpoint, **CPU)
    (repo / "config.json").unlink()
    assert "lacks the file config.json" in message("org/name", tmp_path)
