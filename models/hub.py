"""A model in a Hugging Face hub repo: huggingface_hub's cache, token, endpoint and offline mode.

The revision is resolved once, with one question to the hub; every file is asked for by that commit,
so a push in between never mixes two versions. Without network, what the cache holds is used.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants, errors

from petalnode.errors import ModelError
from petalnode.models.digests import file_sha256, remembered
from petalnode.models.sources import PICKLED

METADATA_TIMEOUT_S = 10.0
_NO_NETWORK = (errors.OfflineModeIsEnabled, httpx.TransportError)


class HubRepo:
    """One repo at one commit. Files are fetched when they are first asked for."""

    is_local = False

    def __init__(self, repo: str, revision: str | None, cache_dir: str | Path | None) -> None:
        self._repo, self._cache_dir = repo, cache_dir
        # Every file of the repo with its sha256 (None: small, not stored by it); None: no network.
        self._files: dict[str, str | None] | None = None
        self._commit = revision
        with _translated(repo, revision):
            listed = None
            with suppress(*_NO_NETWORK):
                listed = self._list_files()
            # By the revision's own name, so that the cache can resolve it without network.
            self._commit = self.path("config.json").parent.name  # snapshots/<commit>/config.json
            if listed not in (None, self._commit):  # a push came between the two answers
                self._list_files()

    def __str__(self) -> str:
        return f"The repo {self._repo}"

    def _list_files(self) -> str | None:
        """Ask the hub for all files at the current commit or revision; return the commit."""
        info = huggingface_hub.HfApi().model_info(
            self._repo, revision=self._commit, files_metadata=True, timeout=METADATA_TIMEOUT_S
        )
        self._files = {
            sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else None
            for sibling in info.siblings or ()
        }
        return info.sha

    def has(self, file: str) -> bool:
        """Return whether the repo, or without network the cache, has a file."""
        return file in self._files if self._files is not None else self.optional(file) is not None

    def optional(self, file: str) -> Path | None:
        """Return the path of a file, fetched where need be; None where it is not to be had."""
        if self._files is not None:
            return self.path(file) if file in self._files else None
        try:
            return self._fetch(file)
        except errors.LocalEntryNotFoundError:
            return None

    def path(self, file: str) -> Path:
        """Return the path of a file that must be there, fetched where need be."""
        if self._files is not None and file not in self._files:
            raise ModelError(f"{self} lacks the file {file}.", "Choose a complete repo.")
        with _translated(self._repo, self._commit):
            return self._fetch(file)

    def pickled_weights(self) -> str | None:
        """Return the name of a file of pickled weights, if there is one."""
        return min((name for name in self._files or () if name.endswith(PICKLED)), default=None)

    def digests(self, files: Sequence[str]) -> list[str]:
        """Return the sha256 of each file: from the hub's own records, so that none is fetched."""
        key = f"hub {constants.ENDPOINT} {self._repo} {self._commit} "
        return [remembered(key + file, partial(self._digest, file)) for file in files]

    def _digest(self, file: str) -> str:
        recorded = (self._files or {}).get(file)
        return recorded or file_sha256(self.path(file))

    def _fetch(self, file: str) -> Path:
        """Return a file's path in the cache, where it is put if it is not there yet."""
        path = huggingface_hub.hf_hub_download(
            self._repo,
            file,
            revision=self._commit,
            cache_dir=self._cache_dir,
            local_files_only=self._files is None,
        )
        return Path(path)


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
