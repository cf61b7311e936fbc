"""A loopback server that speaks as much of the hub's API as loading a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repositories: dict[str, Path]):
    """Serve folders as hub repositories; yields the endpoint's address and the list of requests."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def log_message(self, *_arguments):
            pass

        def _answer(self, *, body):
            path = self.path.partition("?")[0]
            seen.append(path)
            for name, folder in repositories.items():
                if path.startswith(f"/{name}/resolve/"):
                    file = folder / path.split("/", 5)[5]
                    return self._file(file, body) if file.is_file() else self._missing()
                if path.startswith(f"/api/models/{name}"):
                    return self._listing(name, folder, path, body)
            return self._missing("RepoNotFound")

        def _file(self, file, body):
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _listing(self, name, folder, path, body):
            files = sorted(each.name for each in folder.iterdir())
            if "/tree/" in path:
                answer = [
                    {"type": "file", "path": each, "size": (folder / each).stat().st_size, "oid": "0"}
                    for each in files
                ]
            else:
                answer = {
                    "id": name,
                    "modelId": name,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": each} for each in files],
                    "tags": [],
                }
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _missing(self, error="EntryNotFound"):
            self.send_response(404)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
