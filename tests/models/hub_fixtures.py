"""A hub on loopback for tests, and what the tests of loading from it share."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from petalnode.errors import ModelError
from petalnode.models import download
from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.sources import Source, find_source

from .hub_server import HubServer, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that this process's client knows; nothing is waited for, nothing outside is touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(download, "RETRIES", 0)
    with serving() as server:
        # What HF_ENDPOINT sets when huggingface_hub is imported.
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def repo(hub: HubServer, tmp_path: Path) -> Path:
    """The folder of "org/name": no model, but two large files of a few chunks."""
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, size in (("a.safetensors", 3 << 20), ("b.safetensors", 2 << 20)):
        (folder / name).write_bytes(name.encode() * (size // len(name)))
    hub.add("org/name", folder)
    return folder


def open_repo(tmp_path: Path, revision: str | None = None) -> Source:
    return find_source("org/name", revision, tmp_path / "hub")


def message(model: str, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(model, cache_dir=tmp_path / "hub", **options)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def shards(hub: HubServer) -> list[str]:
    return [sent.file for sent in hub.bodies(".safetensors")]


FETCH = """
from petalnode.models import download
from petalnode.models.sources import find_source
download.REPORT_INTERVAL_S = 0
source = find_source("org/name", None, None)
source.fetch(["a.safetensors"], lambda *told: print(*told, flush=True))
print(source.path("a.safetensors"))
"""


def in_a_process(
    hub: HubServer,
    home: Path,
    verb: Sequence[str] = (sys.executable, "-c", FETCH),
    **more: str,
) -> subprocess.Popen[str]:
    """Fetch "a.safetensors" in a process that knows the hub by its environment only."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), **more}
    env["XDG_CACHE_HOME"] = str(home / "xdg")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(verb, env=env, **pipes)
