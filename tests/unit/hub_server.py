"""A hub on this machine, which answers as the Hugging Face hub does, for the libraries that ask it.

It knows the requests with which `huggingface_hub` downloads and uploads files and `datasets`
streams them.
"""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from tests.unit import hub_uploads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_REPO = r"([\w.-]+/[\w.-]+)"
_API = re.compile(
    rf"/api/(?:models|datasets)/{_REPO}(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?"
)
_FILE = re.compile(rf"/(?:datasets/)?{_REPO}/resolve/([^/]+)/(.+)")

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    readers: tuple[str, ...] | None = None
    """Tokens that open the files of a gated repository; None is one for everybody."""
    refusal: str | None = None
    """The error code with which the hub answers whatever is asked about it."""
    private: bool = False


class Hub(ThreadingHTTPServer):
    """The server; use it in a `with` statement, which runs it."""

    def __init__(
        self,
        repositories: dict[str, Repository],
        tokens: tuple[str, ...] = (),
        writers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.tokens = (*tokens, *writers)
        """All that are valid."""
        self.writers = writers
        """Those that may make repositories, see private ones and write to all."""
        self.broken = False
        self.cuts: list[tuple[str, int]] = []
        """Parts of paths, and how many bytes of a body arrive before the connection is lost."""
        self.cut_answers: list[tuple[str, int, float]] = []
        """Parts of paths, how many bytes of a file are sent, and for how many seconds nothing is,
        before the connection is lost; from a request for `/fail/on` to one for
        `/fail/off`."""
        self.is_failing = False
        self.refusals: dict[str, tuple[int, str]] = {}
        """Status and message for the paths that contain a text."""
        self.sent: list[tuple[str, str | None]] = []
        """Path and token of all requests."""
        self.blobs: dict[str, bytes] = {}
        """Large files that have arrived, by their SHA-256."""
        self.commits: list[str] = []
        """The messages of all commits."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        self.server.sent.append((path, token))
        if path.startswith("/fail/"):
            self.server.is_failing = path == "/fail/on"
        cut = next((cut for cut in self.server.cuts if cut[0] in path), None)
        if cut is not None:
            self.server.cuts.remove(cut)
            self.rfile.read(cut[1])
            self.close_connection = True
            return
        status, headers, body = self._answer(unquote(path), query, token, self._body())
        self.send_response(status)
        length = {"Content-Length": str(len(body))}
        for name, value in ({"X-Repo-Commit": COMMIT} | headers | length).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = next((cut for cut in self.server.cut_answers if cut[0] in path), None)
        if cut is None or not self.server.is_failing:
            self.wfile.write(body)
            return
        self.server.cut_answers.remove(cut)
        self.wfile.write(body[: cut[1]])
        self.wfile.flush()
        time.sleep(cut[2])
        self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, path: str, query: str, token: str | None, asked: bytes) -> Answer:
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        match = api or file
        if self.server.broken:
            return 500, {}, b""
        refused = next((of for part, of in self.server.refusals.items() if part in path), None)
        if refused is not None:
            return refused[0], {"X-Error-Message": refused[1]}, b"{}"
        if token is not None and token not in self.server.tokens:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        uploaded = hub_uploads.answer(self.server, self.command, path, token, asked)
        if uploaded is not None:
            return uploaded
        if match is None:
            return 404, {}, b"{}"
        repository = self.server.repositories.get(match[1])
        if repository is None or (repository.private and token not in self.server.writers):
            return _refused(401 if token is None else 404, "RepoNotFound")
        if repository.refusal is not None:
            return _refused(403, repository.refusal)
        if (api[3] if api else match[2]) not in (None, *repository.revisions):
            return _refused(404, "RevisionNotFound")
        if api:
            recursive = "recursive=true" in query.lower()
            named = unquote(asked.decode())
            about = _about(repository.files, api[1], api[2], api[4] or "", recursive, named)
            if isinstance(about, dict):
                about["private"] = repository.private
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        if repository.readers is not None and token not in repository.readers:
            return _refused(401 if token is None else 403, "GatedRepo")
        if match[3] not in repository.files:
            return _refused(404, "EntryNotFound")
        return _whole_or_part(repository.files[match[3]], self.headers.get("Range", ""))


def _refused(status: int, code: str) -> Answer:
    return status, {"X-Error-Code": code}, b"{}"


def _whole_or_part(content: bytes, wanted: str) -> Answer:
    headers = {"ETag": f'"{sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
    numbers = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if not numbers:
        return 200, headers, content
    first, last = int(numbers[1]), int(numbers[2] or len(content) - 1)
    part = content[first : last + 1]
    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
    return 206, headers, part


def _about(
    files: dict[str, bytes], repo: str, what: str, folder: str, recursive: bool, asked: str
) -> Any:
    """What the hub tells of a repository: of a folder, of the paths named in `asked`, or of all."""
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
        for name, content in files.items()
    ]
    if what == "tree":
        return _inside(entries, folder, recursive)
    if what == "paths-info":
        return [entry for entry in entries if entry["path"] in asked]
    siblings = [{"rfilename": name} for name in files]
    return {"id": repo, "sha": COMMIT, "siblings": siblings}


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
