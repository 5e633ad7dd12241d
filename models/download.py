"""One large file over HTTP into a cache, going on after a cut: in this run and in later ones.

huggingface_hub's own download starts again from nothing once its process is gone. Here the bytes go
to `<blob>.incomplete`, which outlives the process, and the next attempt asks for the rest of it.
Whether the whole is right is for the caller to check, by its sha256.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # a lazy package
    WeakFileLock,
    hf_raise_for_status,
    http_stream_backoff,
)

from petalnode.models.sources import Fetching

RETRIES = 5
"""Of a request that is not answered; the waits between them grow from 1 s to 8 s."""
MAX_FRUITLESS = 3
"""Connections in a row that end without having brought a byte."""
REPORT_INTERVAL_S = 0.2


class Meter:
    """Adds up what is here of several files; reports now and then, the last word always."""

    def __init__(
        self, report: Fetching | None, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report, self._total, self._clock = report, total, clock
        self._here: dict[str, int] = {}
        self._next = clock()
        self._told = -1

    def tell(self, file: str, here: int) -> None:
        """Note that `here` bytes of a file are here."""
        self._here[file] = here
        done = sum(self._here.values())
        now = self._clock()
        if self._report is None or done == self._told:
            return
        if now >= self._next or done == self._total:
            self._next, self._told = now + REPORT_INTERVAL_S, done
            self._report(file, done, self._total)


def partial_of(blob: Path) -> Path:
    """Return where the bytes of an unfinished blob are kept."""
    return blob.with_name(blob.name + ".incomplete")


def bytes_here(blob: Path) -> int:
    """Return how many bytes of a blob need not be fetched."""
    for path in (blob, partial_of(blob)):
        if path.exists():
            return path.stat().st_size
    return 0


def download(
    url: str,
    headers: Mapping[str, str],
    blob: Path,
    size: int,
    *,
    lock: Path,
    tell: Callable[[int], None],
) -> None:
    """Fetch `size` bytes from `url` into `blob`; `tell` gets the bytes that are here so far.

    Raises `httpx.TransportError` when the connection stays broken, huggingface_hub's errors when
    the hub says no, `OSError` from the disk; what has come stays. Processes take turns by `lock`.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(blob)
    with WeakFileLock(lock):
        if not blob.exists():
            partial.touch()
            _complete(url, headers, partial, size, tell)
            partial.replace(blob)
    tell(size)


def _complete(
    url: str, headers: Mapping[str, str], partial: Path, size: int, tell: Callable[[int], None]
) -> None:
    """Ask for the rest of `partial` until it is all there, or nothing more comes."""
    fruitless = 0
    while (here := partial.stat().st_size) != size:
        tell(here if here < size else 0)
        error = _receive(url, headers, partial, size, tell)
        fruitless = 0 if partial.stat().st_size > here else fruitless + 1
        if fruitless >= MAX_FRUITLESS:
            raise error or httpx.RemoteProtocolError("the answers are empty")


def _receive(
    url: str, headers: Mapping[str, str], partial: Path, size: int, tell: Callable[[int], None]
) -> httpx.TransportError | None:
    """Ask once for what `partial` lacks; return why the connection ended early, if it did."""
    here = partial.stat().st_size
    if here > size:
        here = 0
    asked = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={here}-"}
    with http_stream_backoff(
        "GET",
        url,
        headers=asked,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        max_retries=RETRIES,
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            here = 0  # the server sends the whole file
        # The library would take an error in this block for one of its own, and ask again.
        try:
            with partial.open("ab" if here else "wb") as file:
                for chunk in response.iter_bytes():
                    here += len(chunk)
                    if here > size:
                        raise httpx.RemoteProtocolError(f"more than {size} bytes came")
                    file.write(chunk)
                    tell(here)
        except httpx.TransportError as error:
            return error
    return None
