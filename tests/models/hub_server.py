"""A loopback server that speaks as much of the hub's API as models and data sets need.

It keeps repositories with a history (a new commit moves ``main``; older ones stay), answers ``HEAD`` and
ranges, and can be told to break: to cut a download after some bytes, to answer with a status, or to send
files from another host.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    """A commit as git would make it: 40 hexadecimal digits that follow from the content."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


@dataclass
class Repository:
    """A repository: commits, and the branches and tags that name them."""

    kind: str = "model"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    status: int | None = None  # what every request for it is answered with
    error_code: str | None = None  # the hub's own name of that error

    @property
    def head(self) -> str:
        return self.names["main"]

    def commit(self, source: Path | dict[str, bytes]) -> str:
        """Put a folder's files (or these) at the head of ``main``."""
        if isinstance(source, Path):
            files = {
                path.relative_to(source).as_posix(): path.read_bytes()
                for path in source.rglob("*")
                if path.is_file()
            }
        else:
            files = dict(source)
        sha = commit_of(files)
        self.commits[sha] = files
        self.names["main"] = sha
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.names.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    range: str | None


# What the hub's client asks for once in a process, whatever it was called for: refused beside the requests
# that tests count and steer, so that none of them depends on which runs first.
HOUSEKEEPING = "/api/agent-harnesses"


@dataclass
class Hub:
    """The running server: what it serves, what it was asked, and how it misbehaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    endpoint: str = ""
    requests: list[Request] = field(default_factory=list)
    # file: bytes after which the connection is cut, once; from then on nothing of it comes any more
    cut_after: dict[str, int] = field(default_factory=dict)
    honour_ranges: bool = True
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the next requests
    refused: dict[str, int] = field(default_factory=dict)  # endings of paths, and what they are answered with
    elsewhere: Hub | None = None  # the host that the bytes of files come from

    def add(
        self, name: str, source: Path | dict[str, bytes], *, kind: str = "model", **settings: object
    ) -> Repository:
        repository = Repository(kind, **settings)  # type: ignore[arg-type]
        repository.commit(source)
        self.repositories[name if kind == "model" else f"datasets/{name}"] = repository
        return repository

    def asked(self, ending: str, method: str = "GET") -> list[Request]:
        return [each for each in self.requests if each.path.endswith(ending) and each.method == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(body=True)

    def log_message(self, *_arguments: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == HOUSEKEEPING:
            self._error(404, "EntryNotFound", body=body)
            return
        token, wanted = self.headers.get("Authorization"), self.headers.get("Range")
        self.hub.requests.append(Request(self.command, path, token, wanted))
        if self.hub.statuses:
            status, headers = self.hub.statuses.pop(0)
            self._send(status, b"", headers, body=body)
            return
        for ending, status in self.hub.refused.items():
            if path.endswith(ending):
                self._send(status, b"", {}, body=body)
                return
        for name, repository in self.hub.repositories.items():
            if path.startswith(f"/{name}/resolve/"):
                self._file(repository, path.removeprefix(f"/{name}/resolve/"), body=body)
                return
            kind = "" if repository.kind == "dataset" else "models/"
            prefix = f"/api/{kind}{name}"
            if path == prefix or path.startswith(prefix + "/"):
                self._api(name, repository, path.removeprefix(prefix).lstrip("/"), body=body)
                return
        self._error(404, "RepoNotFound", body=body)

    def _refused(self, repository: Repository, *, body: bool) -> bool:
        if repository.status is not None:
            self._error(repository.status, repository.error_code, body=body)
        return repository.status is not None

    def _file(self, repository: Repository, rest: str, *, body: bool) -> None:
        if self._refused(repository, body=body):
            return
        revision, _, file = rest.partition("/")
        found = repository.files(revision)
        if found is None:
            self._error(404, "RevisionNotFound", body=body)
            return
        sha, files = found
        if file not in files:
            self._error(404, "EntryNotFound", body=body, commit=sha)
            return
        data = files[file]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
        }
        if self.hub.elsewhere is not None:
            target = f"{self.hub.elsewhere.endpoint}{self.path}"
            headers |= {"Location": target, "X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
            self._send(302, b"", headers, body=body)
            return
        self._bytes(file, data, headers, body=body)

    def _bytes(self, file: str, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        status, start = 200, 0
        wanted = self.headers.get("Range")
        if wanted and self.hub.honour_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"}, body=body)
                return
            headers |= {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            status, data = 206, data[start:end]
        cut = self.hub.cut_after.get(file)
        if body and cut is not None and len(data) > cut:
            self.hub.cut_after[file] = 0
            self._send(status, data, headers, body=False)
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._send(status, data, headers, body=body)

    def _api(self, name: str, repository: Repository, rest: str, *, body: bool) -> None:
        if self._refused(repository, body=body):
            return
        verb, _, argument = rest.partition("/")
        revision, _, folder = argument.partition("/")
        found = repository.files(revision or "main")
        if found is None:
            self._error(404, "RevisionNotFound", body=body)
            return
        sha, files = found
        if verb == "tree":
            answer: object = _tree(files, folder)
        elif verb == "paths-info":
            answer = [each for each in _tree(files, "") if each["type"] == "file"]
        else:
            identity = name.removeprefix("datasets/")
            siblings = [{"rfilename": each} for each in sorted(files)]
            answer = {"id": identity, "sha": sha, "siblings": siblings, "tags": [], "private": False}
        data = json.dumps(answer).encode()
        self._send(200, data, {"Content-Type": "application/json"}, body=body)

    def _error(self, status: int, code: str | None, *, body: bool, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        if commit is not None:
            headers["X-Repo-Commit"] = commit
        self._send(status, b"", headers, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    rows: dict[str, dict[str, object]] = {}
    for name, data in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        first, slash, _ = name.removeprefix(prefix).partition("/")
        if slash:
            rows[first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
        else:
            oid = hashlib.sha1(data).hexdigest()
            rows[first] = {"type": "file", "path": name, "size": len(data), "oid": oid}
    return list(rows.values())


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine, without repositories."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
