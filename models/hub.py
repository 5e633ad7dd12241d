"""A model in a Hugging Face hub repo: huggingface_hub's cache, token, endpoint and offline mode.

The revision is resolved once, with config.json; every later file is asked for by that commit, so a
push in between never mixes two versions, and files in the cache need no network.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import huggingface_hub
from huggingface_hub import constants, errors

from petalnode.errors import ModelError
from petalnode.models.digests import file_sha256, remembered

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

METADATA_TIMEOUT_S = 10.0
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class HubRepo:
    """One repo at one revision. Files are fetched when they are first asked for."""

    is_local = False

    def __init__(self, repo: str, revision: str | None, cache_dir: str | Path | None) -> None:
        self._repo, self._cache_dir = repo, cache_dir
        self._revision, self._offline = revision, False
        with _translated(repo, revision):
            self._config = self._fetch("config.json")
        if self._config is not None:
            self._revision = self._config.parent.name  # snapshots/<commit>/config.json

    def __str__(self) -> str:
        return f"The repo {self._repo}"

    def optional(self, file: str) -> Path | None:
        """Return the path of a file, fetched where need be; None where it is not to be had."""
        if file == "config.json":
            return self._config
        with _translated(self._repo, self._revision):
            try:
                return self._fetch(file)
            except errors.LocalEntryNotFoundError:
                self._offline = True  # do not wait for the network once more
                return None

    def path(self, file: str) -> Path:
        """Return the path of a file that must be there, fetched where need be."""
        with _translated(self._repo, self._revision):
            path = self._fetch(file)
        if path is None:
            raise ModelError(f"{self} lacks the file {file}.", "Choose a complete repo.")
        return path

    def pickled_weights(self) -> str | None:
        """Return the name of a file of pickled weights, if there is one."""
        with _translated(self._repo, self._revision):
            names = [sibling.rfilename for sibling in self._info.siblings or ()]
        return min((name for name in names if name.endswith(PICKLED)), default=None)

    def digests(self, files: Sequence[str]) -> list[str]:
        """Return the sha256 of each file: from the hub's own records, so that none is fetched."""
        key = f"hub {constants.ENDPOINT} {self._repo} {self._revision} "
        return [remembered(key + file, partial(self._digest, file)) for file in files]

    def _digest(self, file: str) -> str:
        with suppress(OSError, httpx.TransportError):  # no network: the cached file itself says it
            for sibling in self._info.siblings or ():
                if sibling.rfilename == file and sibling.lfs is not None:
                    return str(sibling.lfs.sha256)
        return file_sha256(self.path(file))

    @cached_property
    def _info(self) -> "ModelInfo":
        return huggingface_hub.HfApi().model_info(
            self._repo, revision=self._revision, files_metadata=True, timeout=METADATA_TIMEOUT_S
        )

    def _fetch(self, file: str) -> Path | None:
        """Return a file's path in the cache after fetching it; None if the repo lacks it."""
        cached = huggingface_hub.try_to_load_from_cache(
            self._repo, file, cache_dir=self._cache_dir, revision=self._revision
        )
        if cached is not None and not isinstance(cached, str) and self._config_known():
            return None  # an earlier answer of the hub: this commit has no such file
        try:
            path = huggingface_hub.hf_hub_download(
                self._repo,
                file,
                revision=self._revision,
                cache_dir=self._cache_dir,
                local_files_only=self._offline,
            )
        except errors.RemoteEntryNotFoundError:
            return None
        return Path(path)

    def _config_known(self) -> bool:
        return getattr(self, "_config", None) is not None


@contextmanager
def _translated(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into `ModelError`. Order matters: most are also OSErrors."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The repo {repo} is gated, and this machine has no access to it.",
            f"Ask for access at {constants.ENDPOINT}/{repo}, then set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"The repo {repo} has no revision {revision!r}.", "Check the branch, tag or commit."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"There is no directory and no public repo {repo!r} at {constants.ENDPOINT}.",
            "Check the name; if the repo is private, set HF_TOKEN.",
        ) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx.TransportError,
    ) as error:
        raise _unreachable(repo) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(
            f"The hub answered with status {error.response.status_code} for {repo}.",
            "Try again later; with status 401 or 403, check HF_TOKEN.",
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else str(error.strerror or error)
        raise ModelError(
            f"The files of {repo} cannot be stored in the cache: {cause}.",
            "Free some space, or choose another place with --cache-dir.",
        ) from error


def _unreachable(repo: str) -> ModelError:
    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"HF_HUB_OFFLINE is set, and {repo!r} is not whole in the local cache.",
            "Unset HF_HUB_OFFLINE, or give a model directory.",
        )
    return ModelError(
        f"{constants.ENDPOINT} cannot be reached, and {repo!r} is not whole in the local cache.",
        "Check the network, or give a model directory.",
    )
