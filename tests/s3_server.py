"""An S3 server on this machine, moto's, that can fail requests at random or as a test says."""

import logging
import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

BUCKET = "bucket"
_ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0} of the test</Message></Error>"
_CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


class S3Server:
    """The server; use it in a `with` statement, which runs it. Buckets live as long as the process.

    A request fails with the probability `chance`: with status 500 or 503, by a lost connection, or
    by a connection that is lost after the request had its effect.
    """

    def __init__(self) -> None:
        self.chance = 0.0
        self.random = random.Random(0)
        self.refuse: Callable[[str, str], int] = lambda method, path: 0
        """Gets method and path of a request; returns the status to refuse it with, or 0."""
        self.after: Callable[[str, str], None] = lambda method, path: None
        """Called after a request."""
        self.requests: list[tuple[str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find it. The clients' library repeats nothing itself."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "of-the-test",
            "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """All objects below `prefix`, in the bucket, past all faults."""
        bucket = s3_backends["123456789012"]["aws"].buckets.get(BUCKET)
        keys = dict(bucket.keys.items()) if bucket else {}
        return {
            name.removeprefix(prefix): key.value
            for name, key in keys.items()
            if name.startswith(prefix)
        }

    def good_again(self) -> None:
        """Fail no request any more, and forget those there were."""
        self.chance = 0.0
        self.refuse = lambda method, path: 0
        self.after = lambda method, path: None
        self.requests.clear()

    def __enter__(self) -> "S3Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:  # or the order of faults would be that of threads
            self.requests.append((method, path))
            fault = 0.0
            if self.random.random() < self.chance:
                fault = self.random.random()
            if status := self.refuse(method, path):
                return _refused(status, start_response)
            if 0 < fault < 0.5:
                return _refused(500 if fault < 0.25 else 503, start_response)
            if 0.5 <= fault < 0.75:
                _lose_connection(environ)
            answer = list(self._app(environ, start_response))
            self.after(method, path)
            if fault >= 0.75:
                _lose_connection(environ)
            return answer


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with an empty bucket, which clients of this process and its children find."""
    clients = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        s3_backends.reset()
        clients.clear_instance_cache()
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield server
        clients.clear_instance_cache()


def _lose_connection(environ: dict[str, Any]) -> None:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)  # or the client would wait for more
    raise ConnectionResetError


def _refused(status: int, start_response: Any) -> list[bytes]:
    body = _ERROR.format(_CODES[status]).encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    start_response(f"{status} Refused", headers)
    return [body]
