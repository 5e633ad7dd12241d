"""A hub on loopback: as much of the Hugging Face hub's file protocol as its client speaks.

    python tests/models/hub_server.py ORG/NAME=FOLDER …

serves folders as repos, and prints its endpoint as JSON.
Tests use `HubServer` in a thread of theirs, with faults. Large files (`LARGE`) are, as on the hub,
known by their sha256 and sent from another host (here: another name of it) after a redirect.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40
LARGE = (".safetensors", ".bin", ".model")
CHUNK_BYTES = 1 << 16
IDLE_S = 2.0


@dataclass(frozen=True)
class Sent:
    """One answer: `start` is the first byte asked for, `count` the bytes of the body sent."""

    method: str
    file: str
    start: int
    count: int
    authorized: bool


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    text: str = ""


@dataclass
class Faults:
    """What shall go wrong; files are named without their folder."""

    refusals: dict[str, Answer] = field(default_factory=dict)
    """Instead of the answer to: "api", a file's HEAD ("head NAME"), a file's content (its name)."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """For each of the next answers with a file's content: the bytes after which it breaks off."""
    flipped: dict[str, int] = field(default_factory=dict)
    """The byte of a file that is sent wrong."""
    no_ranges: bool = False
    between: Callable[[str, int], None] = lambda file, sent: None
    """Called between the chunks of a body, in the thread that sends it: may wait."""


def refusal(status: int, code: str = "", message: str = "") -> Answer:
    """An error as the hub words it: in headers."""
    return Answer(status, {"X-Error-Code": code, "X-Error-Message": message}, text="{}")


class HubServer(ThreadingHTTPServer):
    """Repos by name and revision, each a folder; `log` has what was answered."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.repos: dict[str, dict[str, tuple[str, Path]]] = {}
        self.faults = Faults()
        self.log: list[Sent] = []
        self.busy = 0
        self.idle = threading.Condition()

    def add(self, repo: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> None:
        """Serve a folder as one revision of a repo."""
        self.repos.setdefault(repo, {}).update(
            {revision: (commit, folder), commit: (commit, folder)}
        )

    def bodies(self, suffix: str = "") -> list[Sent]:
        """The answers that carried a file's content, in order, once none is under way.

        A client has its last byte before the answer is written down. One that hangs is not awaited.
        """
        with self.idle:
            self.idle.wait_for(lambda: self.busy == 0, timeout=IDLE_S)
        return [one for one in self.log if one.method == "GET" and one.file.endswith(suffix)]

    def find(self, method: str, url: str) -> Answer:
        """The answer to one request, faults left aside."""
        parts = unquote(urlsplit(url).path).strip("/").split("/")
        if parts[0] == "cdn":
            return Answer(200, {}, self._stored(parts[1]))
        api = parts[:2] == ["api", "models"] and len(parts) > 3
        if not api and (len(parts) < 5 or parts[2] != "resolve"):
            return refusal(404, message="Not found")
        repo = "/".join(parts[2:4] if api else parts[:2])
        revision = (parts[5] if len(parts) > 5 else "main") if api else parts[3]
        if repo not in self.repos:
            return refusal(404, "RepoNotFound", "Repository not found")
        if revision not in self.repos[repo]:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, folder = self.repos[repo][revision]
        if api:
            blobs = "blobs" in parse_qs(urlsplit(url).query)
            info = {"id": repo, "sha": commit, "siblings": siblings(folder, blobs)}
            return Answer(200, {"Content-Type": "application/json"}, text=json.dumps(info))
        return self._resolve(commit, folder / parts[-1])

    def _resolve(self, commit: str, path: Path) -> Answer:
        head = {"X-Repo-Commit": commit}
        if not path.is_file():
            missing = refusal(404, "EntryNotFound", "Entry not found")
            return Answer(404, {**missing.headers, **head}, text="{}")
        if path.suffix not in LARGE:
            etag = hashlib.sha1(path.read_bytes()).hexdigest()
            return Answer(200, {**head, "ETag": f'"{etag}"'}, path)
        digest, size = sha256(path), path.stat().st_size
        head |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(size)}
        head["Location"] = f"http://localhost:{self.port}/cdn/{digest}/{path.name}"
        return Answer(302, head)

    def _stored(self, digest: str) -> Path:
        folders = [folder for repo in self.repos.values() for _, folder in repo.values()]
        files = (path for folder in folders for path in folder.iterdir() if path.suffix in LARGE)
        return next(path for path in files if sha256(path) == digest)


class Handler(BaseHTTPRequestHandler):
    """One request, one connection."""

    server: HubServer

    def do_HEAD(self) -> None:
        self.reply("HEAD")

    def do_GET(self) -> None:
        self.reply("GET")

    def reply(self, method: str) -> None:
        """Send an answer, or the fault that stands in its place."""
        with self.server.idle:
            self.server.busy += 1
        try:
            self.answer(method)
        finally:
            with self.server.idle:
                self.server.busy -= 1
                self.server.idle.notify_all()

    def answer(self, method: str) -> None:
        """Send it and write it down."""
        name = unquote(urlsplit(self.path).path).rsplit("/", 1)[-1]
        spot = "api" if self.path.startswith("/api/") else f"head {name}" * (method == "HEAD")
        answer = self.server.faults.refusals.get(spot or name)
        if answer is None:
            answer = self.server.find(method, self.path)
        content = self.content(answer, method)
        sent = self.transmit(name, content)
        authorized = "Authorization" in self.headers
        kind = method if answer.file is not None and answer.status == 200 else f"{method} no file"
        self.server.log.append(Sent(kind, name, content[1], sent, authorized))

    def content(self, answer: Answer, method: str) -> tuple[Path | bytes, int, int]:
        """Send the head; return what of it follows: the source, first byte, end."""
        source: Path | bytes = answer.file or answer.text.encode()
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        start, status, extra = 0, answer.status, {}
        asked = self.headers.get("Range", "")
        if answer.file is not None and asked and not self.server.faults.no_ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status, extra = 206, {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        self.send_response(status)
        length = {"Content-Length": str(size - start), "Accept-Ranges": "bytes"}
        for key, value in {**answer.headers, **extra, **length}.items():
            self.send_header(key, value)
        self.end_headers()
        return source, start, size if method == "GET" else start

    def transmit(self, name: str, content: tuple[Path | bytes, int, int]) -> int:
        """Send the body as far as no fault stops it; return the bytes sent."""
        source, start, end = content
        faults, sent = self.server.faults, 0
        if isinstance(source, bytes):
            self.wfile.write(source[start:end])
            return end - start
        cuts = faults.cuts.get(name) if end > start else None
        stop = min(end, start + cuts.pop(0)) if cuts else end
        with source.open("rb") as file:
            file.seek(start)
            while start + sent < stop:
                faults.between(name, sent)
                chunk = bytearray(file.read(min(CHUNK_BYTES, stop - start - sent)))
                wrong = faults.flipped.get(name, -1) - start - sent
                if 0 <= wrong < len(chunk):
                    chunk[wrong] ^= 1
                try:
                    self.wfile.write(chunk)
                except OSError:  # whoever asked has gone
                    break
                sent += len(chunk)
        return sent

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: `HubServer.log` has it all."""


def siblings(folder: Path, blobs: bool) -> list[dict[str, Any]]:
    """Describe a repo's files."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.iterdir()):
        entry: dict[str, Any] = {"rfilename": path.name}
        if blobs:
            entry["size"] = size = path.stat().st_size
            if path.suffix in LARGE:
                entry["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 134}
        found.append(entry)
    return found


def sha256(path: Path) -> str:
    """The digest of a file, computed once as long as the file is the same."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def serving(port: int = 0) -> Iterator[HubServer]:
    """A hub that answers in a thread of its own."""
    with HubServer(port) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def main() -> None:
    """Serve until stdin ends; a line there is answered with what has been sent so far."""
    with serving() as hub:
        for argument in sys.argv[1:]:
            repo, _, folder = argument.partition("=")
            hub.add(repo, Path(folder))
            siblings(Path(folder), blobs=True)  # hash all before the first question
        print(json.dumps({"endpoint": hub.endpoint}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"sent": [asdict(sent) for sent in hub.bodies()]}), flush=True)


if __name__ == "__main__":
    main()
