"""Where a model's files come from: the bundled demo model, a directory, or a hub repo."""

import json
import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from petalnode.errors import ModelError, UsageError
from petalnode.models.digests import file_sha256

DEMO = "demo"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HUB_ID = re.compile(
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>[\w./+-]{1,255}))?", re.ASCII
)


Fetching = Callable[[str, int, int], None]
"""Called with (file being fetched, bytes here, bytes in all); the bytes are those of all files."""


class Source(Protocol):
    """The files of one model; `str(source)` begins a sentence about them."""

    is_local: bool

    def has(self, file: str) -> bool:
        """Return whether the model has a file; fetches nothing."""

    def optional(self, file: str) -> Path | None:
        """Return the path of a file, fetched where need be, or None where the model has none."""

    def path(self, file: str) -> Path:
        """Return the path of a file that must be there, or raise `ModelError`."""

    def fetch(self, files: Sequence[str], report: Fetching | None = None) -> None:
        """See that files are here before they are used; `report` hears how far it is."""

    def pickled_weights(self) -> str | None:
        """Return the name of a file of pickled weights, if there is one."""

    def digests(self, files: Sequence[str]) -> list[str]:
        """Return the sha256 of each file, without fetching those that need not be here."""


class Directory:
    """A model in a local directory."""

    is_local = True

    def __init__(self, directory: Path, label: str | None = None) -> None:
        self._directory = directory
        self._label = label or f"The directory {directory}"

    def __str__(self) -> str:
        return self._label

    def has(self, file: str) -> bool:
        """Return whether the file is there."""
        return (self._directory / file).is_file()

    def optional(self, file: str) -> Path | None:
        """Return the file's path, or None."""
        return self._directory / file if self.has(file) else None

    def path(self, file: str) -> Path:
        """Return the file's path, or raise `ModelError`."""
        path = self.optional(file)
        if path is None:
            raise ModelError(
                f"{self} has no {file}.",
                "Give a model in Hugging Face format: config.json, *.safetensors, tokenizer.json.",
            )
        return path

    def fetch(self, files: Sequence[str], report: Fetching | None = None) -> None:
        """Do nothing: all files are here."""

    def pickled_weights(self) -> str | None:
        """Return the name of a file of pickled weights, if there is one."""
        names = sorted(p.name for p in self._directory.iterdir() if p.suffix in PICKLED)
        return names[0] if names else None

    def digests(self, files: Sequence[str]) -> list[str]:
        """Return the sha256 of each file."""
        return [file_sha256(self.path(file)) for file in files]


def local_directory(place: str) -> Path | None:
    """Return the directory of that name on this machine; ~ and ~user are homes.

    Whatever the text is: `pathlib` raises for a name that is too long, or a user who is none.
    """
    path = os.path.expanduser(place)
    return Path(path) if os.path.isdir(path) else None


def find_source(model: str, revision: str | None, cache_dir: str | Path | None) -> Source:
    """Return where MODEL is. Raises `ModelError` when it is neither a directory nor a hub id.

    Raises `UsageError` for a revision of what has none, or two revisions of one repo.
    """
    directory = local_directory(model)
    if revision is not None and (model == DEMO or directory is not None):
        raise UsageError(
            f"{model} is not a hub repo and has no revision {revision!r}.", "Leave --revision out."
        )
    if model == DEMO:
        return Directory(Path(str(resources.files("petalnode.demo"))), "The bundled demo model")
    if directory is not None:
        return Directory(directory)
    if os.path.isfile(os.path.expanduser(model)):
        raise ModelError(f"{model} is a file.", "Give the directory that holds the model.")
    match = HUB_ID.fullmatch(model)
    if match is None or model.startswith((".", "/", "~")):
        raise ModelError(
            f"There is no directory {model[:200]!r}.",
            'Give a model directory, a Hugging Face repo as "org/name", or "demo".',
        )
    if revision is not None and match["revision"] not in (None, revision):
        raise UsageError(
            f"Two revisions are asked for: {match['revision']!r} in {model!r}, and {revision!r}.",
            "Name one of them.",
        )
    from petalnode.models.hub import HubRepo

    return HubRepo(match["repo"], revision or match["revision"], cache_dir)


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes, or raise `ModelError`."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(
                f"{path} has {size} bytes, more than the {limit} allowed.",
                "Download or copy it again.",
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON.", "Download or copy it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.", "Download or copy it again.")
    return value
