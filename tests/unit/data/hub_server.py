"""A hub on this machine: the requests with which the real `datasets` library reads a dataset."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_REPO = r"([\w.-]+/[\w.-]+)"
_API = re.compile(rf"/api/datasets/{_REPO}(?:/(revision|tree|paths-info)/([^/?]+)/?([^?]*))?")
_FILE = re.compile(rf"/datasets/{_REPO}/resolve/([^/]+)/(.+)")

Repositories = dict[str, dict[str, bytes] | str]
"""Files of each repository, or the error code with which the hub answers."""


class _Handler(BaseHTTPRequestHandler):
    repositories: Repositories
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api, file = _API.match(self.path), _FILE.match(self.path)
        if api and api[1] in self.repositories:
            self._answer_about(api[1], api[2], api[3], unquote(api[4] or ""), body)
        elif file and file[1] in self.repositories:
            self._send_file(file[1], file[2], file[3])
        elif api or file:
            self._refuse(401, "RepoNotFound")
        else:
            self._send(404, b"{}")

    do_HEAD = do_POST = do_GET

    def _answer_about(
        self, repo: str, what: str | None, revision: str | None, folder: str, body: bytes
    ) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        if what == "tree":
            answer: Any = _inside(entries, folder, "recursive=true" in self.path.lower())
        elif what == "paths-info":
            asked = unquote(body.decode())
            answer = [entry for entry in entries if entry["path"] in asked]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
        self._send(200, json.dumps(answer).encode())

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[name]
        headers = {"ETag": f'"{sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self._send(206, part, headers)

    def _files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        """The files of a revision; None, after an answer that says why, if there are none."""
        files = self.repositories[repo]
        if isinstance(files, str):
            self._refuse(403, files)
        elif revision not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return files
        return None

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        head = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}
        for name, value in head.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _inside(entries: list[dict[str, Any]], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder, its folders among them."""
    start = f"{folder}/" if folder else ""
    own = [entry for entry in entries if entry["path"].startswith(start)]
    if recursive:
        return own
    deep = {entry["path"][len(start) :].partition("/")[0] for entry in own}
    files = [entry for entry in own if "/" not in entry["path"][len(start) :]]
    folders = sorted(deep - {entry["path"][len(start) :] for entry in files})
    return files + [{"type": "directory", "path": start + name, "oid": ""} for name in folders]


@contextmanager
def serve(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with these repositories, and the paths that it was asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"repositories": repositories, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
