"""Loading through the real huggingface_hub client, from a small server of its protocol."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from petalnode.errors import ModelError
from petalnode.models.checkpoint import INDEX, SINGLE, load_block_span, load_client, open_checkpoint

from ..checkpoints import MakeCheckpoint

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
COMMIT = "c" * 40


class Hub:
    """Repos by name, each a directory; `requests` are the paths of the files that were sent."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(*hub.answer(self.path), body=False)

            def do_GET(self) -> None:
                self.answer(*hub.answer(self.path), body=True)

            def answer(
                self, status: int, headers: dict[str, str], content: bytes, body: bool
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)
                    if status == 200:
                        hub.requests.append(self.path.rsplit("/", 1)[-1])

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content for one request path."""
        parts = path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        revision = "".join(parts[5:6] if api else parts[3:4]) or "main"
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if api:
            info = {"id": repo, "sha": COMMIT, "siblings": self.siblings(self.repos[repo])}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        content = (self.repos[repo] / parts[-1]).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content

    @staticmethod
    def siblings(directory: Path) -> list[dict[str, Any]]:
        """Describe a repo's files; only weights are in large-file storage."""
        found: list[dict[str, Any]] = []
        for path in sorted(directory.iterdir()):
            entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size}
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": entry["size"], "pointerSize": 134}
            found.append(entry)
        return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_to(monkeypatch, hub.endpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Set what HF_ENDPOINT sets when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def message(model: str, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(model, cache_dir=tmp_path / "hub", **options)
    return str(caught.value)


def test_only_the_needed_shards_are_fetched(
    hub: Hub, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = tiny_checkpoint(max_shard_size="60KB")
    hub.repos["org/name"] = path
    where = json.loads((path / INDEX).read_text())["weight_map"]
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    assert checkpoint.fingerprint == open_checkpoint(str(path)).fingerprint
    assert not [name for name in hub.requests if name.endswith(".safetensors")]
    load_block_span(checkpoint, 1, 2, **CPU)
    fetched = {name for name in hub.requests if name.endswith(".safetensors")}
    assert fetched == {s for n, s in where.items() if n.startswith("model.layers.1.")}
    load_client(checkpoint, **CPU)
    fetched = {name for name in hub.requests if name.endswith(".safetensors")}
    assert fetched < set(where.values())
    assert checkpoint.tokenizer().encode("a")[0] == 0


def test_one_file(hub: Hub, tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    hub.repos["org/name"] = path = tiny_checkpoint()
    checkpoint = open_checkpoint("org/name@main", cache_dir=tmp_path / "hub")
    assert checkpoint.fingerprint == open_checkpoint(str(path)).fingerprint
    assert SINGLE not in hub.requests
    load_client(checkpoint, **CPU)
    assert hub.requests.count(SINGLE) == 1


@pytest.mark.parametrize("how", ["offline variable", "hub down"])
def test_without_network_the_cache_serves(
    hub: Hub,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    hub.repos["org/name"] = tiny_checkpoint(max_shard_size="60KB")
    online = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    load_block_span(online, 0, 1, **CPU)
    fingerprint = online.fingerprint
    if how == "hub down":
        hub.server.server_close()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    assert checkpoint.fingerprint == fingerprint
    load_block_span(checkpoint, 0, 1, **CPU)
    wanted = "HF_HUB_OFFLINE" if how == "offline variable" else "cannot be reached"
    with pytest.raises(ModelError, match=wanted):
        load_block_span(checkpoint, 3, 4, **CPU)
    with pytest.raises(ModelError, match=wanted):
        checkpoint.tokenizer()
    assert wanted in message("org/other", tmp_path)


def test_errors_of_the_hub(hub: Hub, tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    hub.repos["org/name"] = hub.repos["org/gated"] = tiny_checkpoint()
    hub.gated.add("org/gated")
    assert "no public repo 'org/nowhere'" in message("org/nowhere", tmp_path)
    assert "no revision 'v9'" in message("org/name", tmp_path, revision="v9")
    assert "is gated" in message("org/gated", tmp_path)


def test_pickled_repo_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    raw = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 9}
    raw |= {"num_hidden_layers": 1, "intermediate_size": 8}
    (repo / "config.json").write_text(json.dumps(raw))
    (repo / "pytorch_model.bin").write_bytes(b"pickle")
    hub.repos["org/name"] = repo
    assert "only pickled weights (pytorch_model.bin)" in message("org/name", tmp_path)
    assert "pytorch_model.bin" not in hub.requests
    (repo / "pytorch_model.bin").unlink()
    checkpoint = open_checkpoint("org/name", cache_dir=tmp_path / "hub")
    with pytest.raises(ModelError, match="lacks the file model"):
        load_client(checkpoint, **CPU)
    (repo / "config.json").unlink()
    assert "lacks the file config.json" in message("org/name", tmp_path)
