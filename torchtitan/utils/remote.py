"""Object stores through fsspec: `s3://`, `gs://`, `az://` and whatever else is installed. No torch.

There is no rename in them, but a single file is there as a whole or not at all. Credentials and
endpoints come from the environment and the files that the store's own programs read.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torchtitan.utils.files import replace_file
from torchtitan.utils.redaction import redact
from torchtitan.utils.text import format_bytes

T = TypeVar("T")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_PERMANENT = (FileNotFoundError, PermissionError, ImportError, IsADirectoryError)
_PERMANENT_NUMBERS = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_ATTEMPTS = 6
_FIRST_DELAY_SECONDS = 0.5
"""Doubled after each attempt: 15 s in all, in addition to what the store's library repeats."""
_THREADS = 8
_VERSION_KEYS = ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified", "mtime")


class RemoteError(OSError):
    """A request to an object store was refused, or failed too often; the message is for users."""

    def __init__(self, text: str, missing: bool = False):
        super().__init__(text)
        self.missing = missing
        """The store answered that it has no such bucket or file."""


class RemoteFile(NamedTuple):
    """A file in an object store."""

    size: int
    version: str
    """Another text for another content, as far as the store says."""


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, such as `s3://bucket/folder`."""
    return _URL.match(path) is not None


def url_problem(url: str) -> str | None:
    """Return what is wrong with the form of a URL; None if nothing."""
    match = _URL.match(url)
    parts = match[2].split("/") if match else []
    if not parts or not parts[0]:
        return "is not a URL such as s3://bucket/folder"
    if {"", ".", ".."} & set(parts[:-1] + ([parts[-1]] if parts[-1] else [])) or "\0" in url:
        return "has an empty part, or `.` or `..`"
    if "::" in url:  # fsspec would open what follows as another file system
        return "has `::` in it"
    if match and match[1].lower() in ("http", "https"):
        return "is no object store: download the files"
    return None


class RemoteFolder:
    """A folder of an object store, or a file, for which the name is empty.

    Requests are repeated unless the failure is one that would come again. `stop` ends the waiting
    between them. Everything raises `RemoteError`.
    """

    def __init__(self, url: str, stop: threading.Event | None = None):
        self.url = url.rstrip("/")
        self._stop = stop or threading.Event()
        if problem := url_problem(self.url):
            raise RemoteError(f"{url} {problem}")
        import fsspec

        try:
            # A listing that is kept would not show what another machine has written.
            self._fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise RemoteError(f"{self.url} cannot be opened: {error}") from error
        self._root = root.rstrip("/")

    def files(self) -> dict[str, RemoteFile]:
        """Return all files below the folder by name; with wildcards in the URL, those that match.

        Names start at the folder, or at the last folder before the first wildcard.
        """
        root = self._root
        if glob.has_magic(root):
            found = self._ask("listed", lambda: self._fs.glob(root, detail=True))
            root = _before_magic(root)
        else:
            found = self._ask("listed", lambda: self._fs.find(root, detail=True))
        files = {
            path[len(root) :].lstrip("/"): RemoteFile(int(info["size"] or 0), _version(info))
            for path, info in sorted(found.items())
            if info.get("type") == "file" and not path.endswith("/")
        }
        for name in files:  # an object's name is any text, and becomes a path here
            if ".." in name.split("/") or "\0" in name:
                raise RemoteError(f"{self.url} holds {name!r}, which is no name of a file here")
        return files

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if there is none."""
        try:
            data: bytes = self._ask(f"read ({name})", lambda: self._fs.cat_file(self._path(name)))
        except RemoteError as error:
            if error.missing:
                return None
            raise
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._ask(f"written ({name})", lambda: self._fs.pipe_file(self._path(name), data))

    def upload(self, file: Path, name: str) -> None:
        """Write a file of this machine, in place of the one of that name."""

        def put() -> None:
            self._fs.put_file(str(file), self._path(name))

        self._ask(f"written ({name})", put)

    def download(self, name: str, file: Path, size: int) -> None:
        """Write a file to this machine, whole or not at all."""

        def get() -> None:
            with replace_file(file) as stream:
                self._fs.get_file(self._path(name), stream.name)
                found = os.path.getsize(stream.name)
                if found != size:
                    raise OSError(f"{found} bytes arrived of {size}")

        self._ask(f"read ({name})", get)

    def download_all(
        self,
        root: Path,
        files: Mapping[str, RemoteFile],
        done: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Download files below `root`, several at a time; `done` gets the name of each."""

        def fetch(name: str) -> None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.download(name, path, files[name].size)
            done(name)

        pool = ThreadPoolExecutor(_THREADS)
        try:
            for future in [pool.submit(fetch, name) for name in files]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, one after the other; absent ones are no error."""
        for name in names:
            try:
                self._ask(f"deleted ({name})", lambda: self._fs.rm_file(self._path(name)))  # noqa: B023
            except RemoteError as error:
                if not error.missing:
                    raise

    def _path(self, name: str) -> str:
        root = _before_magic(self._root) if glob.has_magic(self._root) else self._root
        return f"{root}/{name}" if name else root

    def _ask(self, what: str, request: Callable[[], T]) -> T:
        delay = _FIRST_DELAY_SECONDS
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return request()
            except Exception as error:
                missing = isinstance(error, FileNotFoundError)
                if attempt == _ATTEMPTS or _is_permanent(error) or self._stop.wait(delay):
                    text = redact(" ".join(str(error).split())) or type(error).__name__
                    text = f"{self.url} cannot be {what}: {text}"
                    raise RemoteError(text, missing) from error
            delay *= 2
        raise AssertionError("the last attempt returns or raises")


def _is_permanent(error: Exception) -> bool:
    """Return whether the same request would fail again: refused, not interrupted."""
    if isinstance(error, _PERMANENT):
        return True
    number = error.errno if isinstance(error, OSError) else None
    # botocore's NoCredentialsError, Google's DefaultCredentialsError, Azure's ClientAuthentication
    return number in _PERMANENT_NUMBERS or bool(
        re.search("Credentials|Authentication", type(error).__name__)
    )


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")


def _before_magic(path: str) -> str:
    """Return the folder of a glob before its first wildcard."""
    parts = path.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


# --- copies on this machine -----------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of the copies: `torchtitan/remote` in `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "torchtitan" / "remote"


def url_of_copy(path: Path) -> str | None:
    """Return the URL that a path in the cache is a copy of; None for other paths."""
    try:
        scheme, *rest = path.resolve().relative_to(cache_folder().resolve()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(rest)}"


def local_copy(url: str, wanted: Callable[[str], bool] | None = None) -> Path:
    """Return the copy of a folder, a file or a glob on this machine, after downloading what lacks.

    Only the `wanted` names are downloaded. One process downloads and the others on its machine
    wait. A download that was interrupted continues with the files that are not there yet. Raises
    `RemoteError`.
    """
    scheme, _, rest = url.partition("://")
    folder = RemoteFolder(url)
    target = cache_folder() / scheme.lower() / rest.rstrip("/")
    root = Path(_before_magic(str(target))) if glob.has_magic(str(target)) else target
    try:
        with downloads_once(cache_folder() / ".locks" / _digest(url)) as is_done:
            if not is_done or wanted is not None:  # another process may have wanted less
                _update(folder, root, wanted or (lambda name: True))
    except RemoteError:
        raise
    except OSError as error:
        fix = "set XDG_CACHE_HOME to a folder that this user may write to, with room for it"
        text = f"{cache_folder()} cannot be written: {error.strerror or error}; {fix}"
        raise RemoteError(text) from error
    return target


@contextmanager
def downloads_once(name: Path) -> Iterator[bool]:
    """Hold the lock `name`; the value says whether another process has just done the work."""
    from huggingface_hub.utils import WeakFileLock

    began = time.time()
    name.parent.mkdir(parents=True, exist_ok=True)
    done = name.with_name(f"{name.name}.done")
    with WeakFileLock(f"{name}.lock"):
        yield done.exists() and done.stat().st_mtime >= began
        done.touch()


def _update(folder: RemoteFolder, root: Path, wanted: Callable[[str], bool]) -> None:
    """Make the files below `root` those of the store."""
    files = folder.files()
    if not files:
        raise RemoteError(f"{folder.url} holds no file", missing=True)
    record = cache_folder() / ".versions" / f"{_digest(folder.url)}.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    _remove_others(folder.url, root, files)
    lacking = {
        name: file
        for name, file in files.items()
        if wanted(name) and known.get(name) != _entry(root / name, file)
    }
    cache_folder().mkdir(parents=True, exist_ok=True)
    require_room(folder.url, cache_folder(), sum(file.size for file in lacking.values()))
    record.parent.mkdir(parents=True, exist_ok=True)

    def note(name: str) -> None:
        known[name] = _entry(root / name, files[name])

    try:
        folder.download_all(root, lacking, note)
    finally:
        record.write_text(json.dumps(known))


def _entry(path: Path, file: RemoteFile) -> list[Any]:
    """Return what is kept of a downloaded file, which another copy of it does not have."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [file.version, file.size, status.st_size, status.st_mtime_ns]


def _remove_others(url: str, root: Path, files: Mapping[str, RemoteFile]) -> None:
    """Remove copies of files that the store no longer has: a dataset would read them."""
    scope = Path(cache_folder(), *url.replace("://", "/", 1).split("/"))
    found = glob.glob(str(scope), recursive=True) if glob.has_magic(url) else root.rglob("*")
    for path in map(Path, found):
        if path.is_file() and path != root and str(path.relative_to(root)) not in files:
            path.unlink(missing_ok=True)


def require_room(url: str, folder: Path, num_bytes: int) -> None:
    """Raise `RemoteError` if a copy does not fit into `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        needs = f"needs {format_bytes(num_bytes)}, and {format_bytes(free)} are free"
        raise RemoteError(f"the copy of {url} in {folder} {needs}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
