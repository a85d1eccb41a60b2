"""A small server that answers as the Hugging Face hub does, for the library that asks it."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    readers: tuple[str, ...] | None = None
    """Tokens that open a gated repository; None is one for everybody."""


class Hub(ThreadingHTTPServer):
    """The server; use it in a `with` statement, which runs it."""

    def __init__(self, repositories: dict[str, Repository], tokens: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.tokens = tokens
        """All that are valid."""
        self.broken = False
        self.sent: list[tuple[str, str | None]] = []
        """Path and token of all requests."""

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
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        self.server.sent.append((path, token))
        status, headers, body = self._answer(path, token)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        if self.server.broken:
            return 500, {}, b""
        if token is not None and token not in self.server.tokens:
            message = "Invalid credentials in Authorization header"
            return 401, {"X-Error-Message": message}, b""
        is_listing = path.startswith("/api/models/")
        owner, name, kind, revision, *rest = [
            *path.removeprefix("/api/models").strip("/").split("/"),
            *("", "", ""),
        ]
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None or kind not in ("revision", "resolve"):
            return 401 if token is None else 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in repository.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if is_listing:
            siblings = [{"rfilename": file} for file in repository.files]
            listing = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        if repository.readers is not None and token not in repository.readers:
            return 401 if token is None else 403, {"X-Error-Code": "GatedRepo"}, b""
        content = repository.files.get("/".join(filter(None, rest)))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content
