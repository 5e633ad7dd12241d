"""A model in a Hugging Face hub repo: huggingface_hub's cache, token, endpoint and offline mode.

The revision is resolved once, with one question to the hub; every file is asked for by that commit,
so a push in between never mixes two versions. Large files come by `models/download.py` into the
standard cache, and are checked against the sha256 that the hub records before they are first used.
While the hub cannot be reached, what the cache holds is used.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # a lazy package
    build_hf_headers,
    disable_progress_bars,
)

from petalnode.errors import ModelError
from petalnode.models.digests import file_sha256, remembered
from petalnode.models.download import Meter, bytes_here, download
from petalnode.models.sources import PICKLED, Fetching

METADATA_TIMEOUT_S = 10.0
UNAVAILABLE = (408, 429, 500, 502, 503, 504)
"""What a hub answers that has a bad day."""
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Recorded:
    """What the hub records of a file in its large-file storage; `size` in bytes."""

    sha256: str
    size: int


class HubRepo:
    """One repo at one commit. Files are fetched when they are first asked for."""

    is_local = False

    def __init__(
        self,
        repo: str,
        revision: str | None,
        cache_dir: str | Path | None,
        first: str = "config.json",
    ) -> None:
        """`first`: a small file that the repo must have; by it the commit is found."""
        self._repo, self._cache = repo, Path(cache_dir or constants.HF_HUB_CACHE)
        self._first = first
        # Every file of the repo (None: small); no dictionary: the hub has not been reached yet.
        self._files: dict[str, Recorded | None] | None = None
        self._away = ""  # why not, as half a sentence
        self._commit = revision
        self._checked: set[Path] = set()
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            disable_progress_bars()  # progress is for whoever called us to show
        check_token(huggingface_hub.get_token() or "")
        with _translated(repo, revision):
            listed = self._list_files()
            # By the revision's own name, so that the cache can resolve it without network.
            self._commit = self._resolve()
            if listed not in (None, self._commit):  # a push came between the two answers
                self._list_files()

    def __str__(self) -> str:
        return f"The repo {self._repo}"

    def has(self, file: str) -> bool:
        """Return whether the repo, or without network the cache, has a file."""
        return self._cached(file) is not None if self._files is None else file in self._files

    def optional(self, file: str) -> Path | None:
        """Return the path of a file, fetched where need be; None where it is not to be had."""
        return self.path(file) if self.has(file) else None

    def path(self, file: str) -> Path:
        """Return the path of a file that must be there, fetched where need be."""
        return self._fetch_one(file, Meter(None, 0))

    def fetch(self, files: Sequence[str], report: Fetching | None = None) -> None:
        """Fetch what is not in the cache yet, each file once; `report` hears of the large ones.

        Raises `ModelError`, also when the disk has no room for all of them.
        """
        missing = [file for file in dict.fromkeys(files) if self._cached(file) is None]
        with _translated(self._repo, self._commit):
            if missing:
                self._reach()
            large = {file: one for file in missing if (one := (self._files or {}).get(file))}
            self._check_room(sum(one.size - bytes_here(self._blob(one)) for one in large.values()))
        meter = Meter(report, sum(one.size for one in large.values()))
        for file in missing:
            self._fetch_one(file, meter)

    def pickled_weights(self) -> str | None:
        """Return the name of a file of pickled weights, if there is one."""
        return min((name for name in self._files or () if name.endswith(PICKLED)), default=None)

    def digests(self, files: Sequence[str]) -> list[str]:
        """Return the sha256 of each file: from the hub's own records, so that none is fetched."""
        key = f"hub {constants.ENDPOINT} {self._repo} {self._commit} "
        return [remembered(key + file, partial(self._digest, file)) for file in files]

    def _digest(self, file: str) -> str:
        recorded = (self._files or {}).get(file)
        return recorded.sha256 if recorded else file_sha256(self.path(file))

    def _list_files(self) -> str | None:
        """Ask the hub for all files at the current commit or revision; return the commit."""
        try:
            info = huggingface_hub.HfApi().model_info(
                self._repo, revision=self._commit, files_metadata=True, timeout=METADATA_TIMEOUT_S
            )
        except (errors.OfflineModeIsEnabled, httpx.TransportError):
            offline = constants.HF_HUB_OFFLINE
            self._away = "HF_HUB_OFFLINE is set" if offline else "it cannot be reached"
            return None
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in UNAVAILABLE:
                raise
            self._away = f"it answers with status {error.response.status_code}"
            return None
        except errors.HFValidationError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError):  # say, a hotel's login page
            self._away = "what answers there is no hub"
            return None
        self._files = {s.rfilename: _recorded(s) for s in info.siblings or ()}
        return info.sha

    def _reach(self) -> None:
        """See that the list of files is there, or raise that the hub is away."""
        if self._files is None and self._list_files() is None:
            raise self._unreachable()

    def _unreachable(self) -> ModelError:
        if constants.HF_HUB_OFFLINE:
            remedy = "Unset HF_HUB_OFFLINE, or give a model directory."
        else:
            remedy = "Check the network and HF_ENDPOINT and try again, or give a model directory."
        return ModelError(
            f"{constants.ENDPOINT} is needed because the cache lacks files of {self._repo!r}, "
            f"but {self._away}.",
            remedy,
        )

    def _resolve(self) -> str:
        """Return the commit of the revision, and make the cache remember it by its name."""
        if self._files is not None and self._first not in self._files:
            raise self._lacks(self._first)
        try:
            path = self._standard(self._first, local_only=self._files is None)
        except errors.LocalEntryNotFoundError as error:
            if self._files is not None:
                self._away = "it broke off"
            raise self._unreachable() from error
        return path.parent.name  # snapshots/<commit>/<first>

    def _lacks(self, file: str) -> ModelError:
        return ModelError(f"{self} lacks the file {file}.", "Choose a complete repo.")

    def _fetch_one(self, file: str, meter: Meter) -> Path:
        with _translated(self._repo, self._commit):
            path = self._cached(file)
            if path is None:
                self._reach()
                files = self._files or {}
                if file not in files:
                    raise self._lacks(file)
                recorded = files[file]
                if recorded is not None and recorded.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                    self._fetch_blob(file, recorded, meter)
                path = self._standard(file)
            self._check(file, path)
        return path

    def _fetch_blob(self, file: str, recorded: Recorded, meter: Meter) -> None:
        """Put a large file's bytes where huggingface_hub's cache has them."""
        folder, blob = repo_folder_name(repo_id=self._repo, repo_type="model"), self._blob(recorded)
        try:
            download(
                huggingface_hub.hf_hub_url(self._repo, file, revision=self._commit),
                build_hf_headers(library_name="petalnode"),
                blob,
                recorded.size,
                lock=self._cache / ".locks" / folder / f"{recorded.sha256}.lock",
                tell=partial(meter.tell, file),
            )
        except httpx.TransportError as error:
            raise ModelError(
                f"The download of {file} broke off at {bytes_here(blob) / 1e6:,.1f} of "
                f"{recorded.size / 1e6:,.1f} MB: {str(error) or type(error).__name__}.",
                "Check the network and start again: it goes on from there.",
            ) from error

    def _standard(self, file: str, local_only: bool = False) -> Path:
        """Let huggingface_hub find or fetch a file; a blob that is there needs only its link."""
        path = huggingface_hub.hf_hub_download(
            self._repo,
            file,
            revision=self._commit,
            cache_dir=self._cache,
            local_files_only=local_only,
        )
        return Path(path)

    def _cached(self, file: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(
            self._repo, file, cache_dir=self._cache, revision=self._commit
        )
        return Path(found) if isinstance(found, str) else None

    def _check(self, file: str, path: Path) -> None:
        """Compare a large file with its sha256, once; what differs is deleted."""
        if path in self._checked:
            return
        recorded = (self._files or {}).get(file)
        blob = Path(os.readlink(path)).name if path.is_symlink() else ""
        wanted = recorded.sha256 if recorded else blob  # large files' blobs are named after it
        if SHA256.fullmatch(wanted) and file_sha256(path) != wanted:
            (self._blobs / wanted).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise ModelError(
                f"The file {file} of {self._repo} in the cache was damaged: its sha256 is not the "
                "one that the hub records.",
                "It has been deleted: start again to download it again.",
            )
        self._checked.add(path)

    def _check_room(self, wanted: int) -> None:
        """Raise `ModelError` when the cache's disk has less than `wanted` bytes left."""
        folder = next(one for one in (self._cache, *self._cache.parents) if one.exists())
        free = shutil.disk_usage(folder).free
        if free < wanted:
            raise ModelError(
                f"{wanted / 1e6:,.1f} MB of {self._repo} are still to be downloaded, and "
                f"{self._cache} has {free / 1e6:,.1f} MB free.",
                "Free some space, or choose another place with --cache-dir.",
            )

    def _blob(self, recorded: Recorded) -> Path:
        return self._blobs / recorded.sha256

    @property
    def _blobs(self) -> Path:
        return self._cache / repo_folder_name(repo_id=self._repo, repo_type="model") / "blobs"


def check_token(token: str) -> None:
    """Raise `ModelError` for a token that no HTTP header can carry."""
    if not token.isascii() or not token.isprintable():
        raise ModelError(
            "The token of this machine (HF_TOKEN) has characters that no token has.",
            "Set it again, without anything around it.",
        )


def _recorded(sibling: RepoSibling) -> Recorded | None:
    """Return what the hub records of a large file; its sha256 will be part of a path."""
    lfs = sibling.lfs
    if lfs is None or not SHA256.fullmatch(lfs.sha256):
        return None
    return Recorded(lfs.sha256, lfs.size)


@contextmanager
def _translated(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into `ModelError`. Order matters: most are also OSErrors."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(repo) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"The repo {repo} has no revision {revision!r}.", "Check the branch, tag or commit."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise _unknown(repo) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{constants.ENDPOINT} cannot be reached for a file of {repo!r}.",
            "Check the network and try again: what has been downloaded is kept.",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code) from error
    except httpx.HTTPError as error:
        raise ModelError(
            f"{constants.ENDPOINT} broke off while it sent a file of {repo!r}: {error}.",
            "Check the network and try again: what has been downloaded is kept.",
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else str(error.strerror or error)
        raise ModelError(
            f"The files of {repo} cannot be stored in the cache: {cause}.",
            f"{'Free some space, or choose' if full else 'Choose'} another place with --cache-dir.",
        ) from error


def _unknown(repo: str) -> ModelError:
    return ModelError(
        f"There is no directory and no public repo {repo!r} at {constants.ENDPOINT}.",
        "Check the name; if the repo is private, set HF_TOKEN to a token that may read it.",
    )


def _gated(repo: str) -> ModelError:
    where = f"{constants.ENDPOINT}/{repo}"
    if huggingface_hub.get_token() is None:
        remedy = f"Ask for access at {where}, then set HF_TOKEN to a token of that account."
    else:
        remedy = f"Ask for access at {where} with the account that the token (HF_TOKEN) is of."
    return ModelError(f"The repo {repo} is gated, and this machine has no access to it.", remedy)


def _refused(repo: str, status: int) -> ModelError:
    if status == httpx.codes.UNAUTHORIZED and huggingface_hub.get_token() is None:
        return _unknown(repo)
    if status == httpx.codes.UNAUTHORIZED:
        return ModelError(
            f"{constants.ENDPOINT} does not accept the token of this machine (status 401).",
            "Set HF_TOKEN to a valid token, or unset it for a public repo.",
        )
    if status == httpx.codes.FORBIDDEN:
        return ModelError(
            f"{constants.ENDPOINT} forbids access to {repo} (status 403).",
            "Check what the token in HF_TOKEN may read, or choose another repo.",
        )
    return ModelError(
        f"{constants.ENDPOINT} answered with status {status} for {repo}.",
        "Try again later: what has been downloaded is kept.",
    )
