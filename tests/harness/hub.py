"""A hub of one data set, on this machine: what `datasets` asks of the Hugging Face hub, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

_COMMIT = "a" * 40


@contextmanager
def hub_with(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub that has the data set `name`, until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            file = re.fullmatch(f"/datasets/{name}/resolve/[^/]+/(.+)", path)
            if file and file[1] in files:
                self._answer(200, files[file[1]], ETag=f'"{file[1]}"')
            elif path.startswith(f"/api/datasets/{name}/tree/{_COMMIT}") and path.endswith(_COMMIT):
                entries = [
                    {"type": "file", "path": path, "size": len(content), "oid": "b" * 40}
                    for path, content in files.items()
                ]
                self._answer(200, json.dumps(entries).encode())
            elif path.startswith(f"/api/datasets/{name}/revision/"):
                self._answer(200, json.dumps({"id": name, "sha": _COMMIT}).encode())
            else:
                error = "EntryNotFound" if name in path else "RepoNotFound"
                self._answer(404, b"", **{"X-Error-Code": error})

        do_HEAD = do_GET

        def _answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            lengths = {"X-Repo-Commit": _COMMIT, "Content-Length": str(len(content))}
            for header, value in (lengths | headers).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
