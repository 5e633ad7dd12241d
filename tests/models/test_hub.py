"""Loading through the real huggingface_hub client from a hub on loopback."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from petalnode.errors import ModelError
from petalnode.models import download
from petalnode.models.checkpoint import INDEX, SINGLE, open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.sources import find_source

from ..checkpoints import MakeCheckpoint
from .hub_fixtures import in_a_process, message, open_repo, shards
from .hub_server import Answer, HubServer, refusal, sha256

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
OTHER = "d" * 40


def test_only_the_needed_shards_are_fetched(
    hub: HubServer, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = tiny_checkpoint(max_shard_size="60KB")
    hub.add("org/name", path)
    where = json.loads((path / INDEX).read_text())["weight_map"]
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    assert checkpoint.fingerprint == open_checkpoint(str(path)).fingerprint
    assert shards(hub) == []
    load_block_span(checkpoint, 1, 2, **CPU)
    needed = {shard for name, shard in where.items() if name.startswith("model.layers.1.")}
    assert sorted(shards(hub)) == sorted(needed)
    load_client(checkpoint, **CPU)
    assert set(shards(hub)) < set(where.values())
    assert len(shards(hub)) == len(set(shards(hub)))
    assert checkpoint.tokenizer().encode("a")[0] == 0


def test_one_file(hub: HubServer, tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = tiny_checkpoint()
    hub.add("org/name", path)
    checkpoint = open_checkpoint("org/name@main", cache_dir=tmp_path / "hub")
    assert checkpoint.fingerprint == open_checkpoint(str(path)).fingerprint
    assert shards(hub) == []
    load_client(checkpoint, **CPU)
    assert shards(hub) == [SINGLE]


def test_the_revision_is_honoured(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(repo, newer)
    (newer / "a.safetensors").write_bytes(b"new")
    hub.add("org/name", newer, "v2", OTHER)
    for revision, model in (("v2", "org/name"), (None, "org/name@v2"), (OTHER, "org/name")):
        source = find_source(model, revision, tmp_path / "hub")
        assert source.path("a.safetensors").read_bytes() == b"new"
    old = open_repo(tmp_path).path("a.safetensors")
    assert old.read_bytes() == (repo / "a.safetensors").read_bytes()
    assert old.is_relative_to(tmp_path / "hub")


def test_a_push_between_two_answers(
    hub: HubServer, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of files is asked for again, so that it is of the commit that the files are of."""
    newer = tmp_path / "newer"
    shutil.copytree(repo, newer)
    (newer / "a.safetensors").write_bytes(b"new")
    find = hub.find

    def find_then_push(method: str, url: str) -> Answer:
        answer = find(method, url)
        hub.add("org/name", newer, "main", OTHER)
        return answer

    monkeypatch.setattr(hub, "find", find_then_push)
    source = open_repo(tmp_path)
    assert source.path("a.safetensors").read_bytes() == b"new"
    assert source.digests(["a.safetensors"]) == [sha256(newer / "a.safetensors")]


def test_a_cut_download_goes_on_where_it_was(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    hub.faults.cuts["a.safetensors"] = [1_000_000, 500_000]
    assert sha256(open_repo(tmp_path).path("a.safetensors")) == sha256(repo / "a.safetensors")
    size = (repo / "a.safetensors").stat().st_size
    assert [(s.start, s.count) for s in hub.bodies(".safetensors")] == [
        (0, 1_000_000),
        (1_000_000, 500_000),
        (1_500_000, size - 1_500_000),
    ]


def test_what_came_before_a_failure_is_kept(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    hub.faults.cuts["a.safetensors"] = [1_000_000, *[0] * download.MAX_FRUITLESS]
    with pytest.raises(ModelError, match=r"a.safetensors broke off at 1.0 of 3.1 MB.*goes on from"):
        open_repo(tmp_path).path("a.safetensors")
    hub.log.clear()
    open_repo(tmp_path).path("a.safetensors")
    assert [sent.start for sent in hub.bodies(".safetensors")] == [1_000_000]


def test_two_that_want_one_file_fetch_it_once(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    sources = [open_repo(tmp_path) for _ in range(2)]
    threads = [threading.Thread(target=one.path, args=("a.safetensors",)) for one in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shards(hub) == ["a.safetensors"]
    assert sha256(sources[0].path("a.safetensors")) == sha256(repo / "a.safetensors")


def test_a_server_without_ranges(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    hub.faults.no_ranges = True
    hub.faults.cuts["a.safetensors"] = [1_000_000]
    assert sha256(open_repo(tmp_path).path("a.safetensors")) == sha256(repo / "a.safetensors")


def test_a_killed_download_goes_on_in_the_next_process(
    hub: HubServer, repo: Path, tmp_path: Path
) -> None:
    reached, going_on = threading.Event(), threading.Event()

    def between(file: str, sent: int) -> None:
        if file == "a.safetensors" and sent >= 2_200_000:
            reached.set()
            going_on.wait()

    hub.faults.between = between
    with in_a_process(hub, tmp_path) as first:
        assert reached.wait(30)
        assert first.stdout is not None
        while int(first.stdout.readline().split()[1]) < 2_000_000:
            pass  # it says how far it is before it is through
        first.kill()
    going_on.set()
    here = next((tmp_path / "hf").rglob("*.incomplete")).stat().st_size
    assert here >= 2_000_000
    with in_a_process(hub, tmp_path, HF_TOKEN="secret") as second:
        out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    lines = out.splitlines()
    size = (repo / "a.safetensors").stat().st_size
    assert lines[0] == f"a.safetensors {here} {size}"
    assert lines[-2] == f"a.safetensors {size} {size}"
    assert lines.count(lines[-2]) == 1
    assert Path(lines[-1]).read_bytes() == (repo / "a.safetensors").read_bytes()
    assert Path(lines[-1]).is_relative_to(tmp_path / "hf")
    assert err == ""
    assert [sent.start for sent in hub.bodies(".safetensors") if sent.start] == [here]
    # The token is for the hub, not for the host that it sends us to.
    assert any(sent.authorized for sent in hub.log)
    assert not any(sent.authorized for sent in hub.bodies(".safetensors"))
    with in_a_process(hub, tmp_path, HF_HUB_OFFLINE="1") as third:
        assert third.communicate(timeout=60) == (lines[-1] + "\n", "")


@pytest.mark.parametrize("how", ["offline variable", "hub down", "status 503", "no hub there"])
def test_without_the_hub_the_cache_serves(
    hub: HubServer,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    hub.add("org/name", tiny_checkpoint(max_shard_size="60KB"))
    online = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    load_block_span(online, 0, 1, **CPU)
    fingerprint = online.fingerprint
    wanted = how
    if how == "hub down":
        hub.server_close()
        wanted = "cannot be reached"
    elif how == "offline variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        wanted = "HF_HUB_OFFLINE is set"
    elif how == "status 503":
        hub.faults.refusals["api"] = refusal(503)
    else:
        hub.faults.refusals["api"] = Answer(200, text="<html>Pay here</html>")
        wanted = "is no hub"
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    assert checkpoint.fingerprint == fingerprint
    load_block_span(checkpoint, 0, 1, **CPU)
    with pytest.raises(ModelError, match=wanted):
        load_block_span(checkpoint, 3, 4, **CPU)
    with pytest.raises(ModelError, match=wanted):
        checkpoint.tokenizer()
    assert wanted in message("org/other", tmp_path)


def test_a_hub_that_comes_back_is_used(hub: HubServer, repo: Path, tmp_path: Path) -> None:
    open_repo(tmp_path)
    hub.faults.refusals["api"] = refusal(500)
    source = open_repo(tmp_path)
    with pytest.raises(ModelError, match="but it answers with status 500"):
        source.path("a.safetensors")
    del hub.faults.refusals["api"]
    assert source.path("a.safetensors").is_file()


def test_progress_is_told_for_all_files_together(
    hub: HubServer, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "REPORT_INTERVAL_S", 0.0)
    told: list[tuple[str, int, int]] = []
    source = open_repo(tmp_path)
    source.fetch(["a.safetensors", "config.json", "b.safetensors"], lambda *one: told.append(one))
    total = sum((repo / name).stat().st_size for name in ("a.safetensors", "b.safetensors"))
    assert {one[2] for one in told} == {total}
    done = [one[1] for one in told]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, total)
    assert len(done) >= 6
    assert list(dict.fromkeys(one[0] for one in told)) == ["a.safetensors", "b.safetensors"]
    assert are_progress_bars_disabled()
    told.clear()
    source.fetch(["a.safetensors", "b.safetensors"], lambda *one: told.append(one))
    assert told == []


def test_progress_is_told_now_and_then() -> None:
    told: list[tuple[str, int, int]] = []
    now = 5.0
    meter = download.Meter(lambda *one: told.append(one), 100, lambda: now)
    for here in (0, 10, 20):
        meter.tell("a", here)
    now += download.REPORT_INTERVAL_S
    meter.tell("b", 30)
    meter.tell("b", 60)
    meter.tell("a", 40)
    meter.tell("a", 40)
    assert told == [("a", 0, 100), ("b", 50, 100), ("a", 100, 100)]


def test_a_span_tells_of_its_download(
    hub: HubServer, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Before the first block is read, all of its shards are fetched, and only they."""
    path = tiny_checkpoint(max_shard_size="60KB")
    hub.add("org/name", path)
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    told: list[tuple[str, int, int]] = []
    load_block_span(checkpoint, 1, 2, **CPU, fetching=lambda *one: told.append(one))
    total = sum((path / shard).stat().st_size for shard in shards(hub))
    assert told[-1][1:] == (total, total)
    load_client(checkpoint, **CPU, fetching=lambda *one: told.append(one))
    assert told[-1][1] == told[-1][2] != total
