"""The files of a dataset: finding them, and reading plain and compressed ones as bytes."""

import codecs
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from torchtitan.config import ConfigError, DataError, Problem

KEY = "training.dataset_path"
BOM = codecs.BOM_UTF8
Kind = Literal["json", "text", "parquet"]

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
_TITLES: dict[Kind, str] = {"json": "JSON", "text": "text", "parquet": "Parquet"}
_POINTER = b"version https://git-lfs"
"""How the file begins that stands for one which Git LFS has not fetched yet."""
DAMAGED_FILE = "the compressed file is damaged"
"""How the flaw of a row begins that is one of its file."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class DataFile:
    """A file as it was when the run started; reading notices when it has changed."""

    path: str
    size: int
    """Bytes on disk."""

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(os.path.splitext(self.path)[1].lower())

    def open(self) -> BinaryIO:
        """The (decompressed) content. Raises DataError if the file is not what it was."""
        try:
            size = os.path.getsize(self.path)
            file = open(self.path, "rb")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if size != self.size:
            file.close()
            raise DataError(
                f"{self.path}: had {self.size} bytes when the run started and has {size} now;"
                " data files must not change during a run"
            )
        if self.compression == "gzip":
            file.close()
            return io.BufferedReader(gzip.GzipFile(self.path, "rb"), buffer_size=1 << 16)  # type: ignore[arg-type]
        if self.compression == "zstd":
            return io.BufferedReader(ZstdReader(file), buffer_size=1 << 16)
        return file


class ZstdReader(io.RawIOBase):
    """Decompresses zstd frames, and raises EOFError if the last one is cut short.

    The library's own reader takes the end of the file for the end of the data.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._ready:
            # Small parts: a block of zeros compresses 30,000-fold, and memory must stay bounded.
            part = self._compressed or self._file.read(1 << 14)
            self._compressed = b""
            if not part:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(part)
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def corruption(error: Exception) -> str | None:
    """What is wrong with a compressed file that raised `error`; None for any other error."""
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return f"{DAMAGED_FILE} or cut short ({error})"
    if type(error).__name__ == "ZstdError":
        return f"{DAMAGED_FILE} ({error})"
    return None


def find_files(path: str, kind: Kind | Literal["auto"]) -> tuple[Kind, list[DataFile]]:
    """The files that a path, folder or glob stands for, sorted, and their kind.

    Empty files are left out. Raises ConfigError: nothing there, nothing but empty files, one file
    under two names, or (with "auto") suffixes that do not tell the kind.
    """
    paths = _expand(path, kind)
    _refuse_twice(path, paths)
    if kind == "auto":
        kind = _kind_of(path, paths)
    files = []
    for file in paths:
        if not os.access(file, os.R_OK):
            raise _error(path, f"no permission to read {file}", "change the file's permissions")
        files.append(DataFile(file, os.path.getsize(file)))
        if _is_pointer(files[-1]):
            problem = f"{file} only stands for a file that Git LFS has not fetched"
            raise _error(path, problem, "run `git lfs pull` in the folder of the data")
    if not any(file.size for file in files):
        raise _error(path, f"all {len(files)} files are empty", "give files with content")
    return kind, [file for file in files if file.size]


def suffix_kind(path: str) -> Kind | None:
    """What the suffix says about a file, looking through `.gz` and `.zst`."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix not in COMPRESSIONS:
        return SUFFIXES.get(suffix)
    kind = SUFFIXES.get(os.path.splitext(stem)[1])
    # A footer at the end of a compressed file cannot be reached.
    return None if kind == "parquet" else kind


def _expand(path: str, kind: str) -> list[str]:
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        paths = [path for path in _walk(expanded) if _fits(os.path.basename(path), kind)]
        if not paths:
            suffixes = [name for name, of in SUFFIXES.items() if kind in ("auto", of)]
            wanted = "files" if kind == "text" else f"{', '.join(suffixes)} files"
            raise _error(path, f"the folder holds no {wanted}", "name the files by a glob")
        return sorted(paths)
    if glob.has_magic(expanded):
        paths = sorted(name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
        if paths:
            return paths
    if "://" in path:
        fix = 'mount that storage or copy the files; a dataset of the hub is named "hf:owner/name"'
        raise _error(path, "is a URI, and files are read from file systems only", fix)
    where = os.path.abspath(expanded)
    if glob.has_magic(expanded):
        raise _error(path, f"no file matches {where}", "correct the glob", missing_asset=True)
    raise _error(path, f"{where} does not exist", "correct the path", missing_asset=True)


def _walk(folder: str) -> Iterator[str]:
    """The files below a folder, but for what programs keep there for themselves, as in `.git` and
    `.cache`."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (os.path.join(place, name) for name in names if not name.startswith((".", "_")))


def _fits(name: str, kind: str) -> bool:
    found = suffix_kind(name)
    return kind == "text" or (found is not None if kind == "auto" else found == kind)


def _is_pointer(file: DataFile) -> bool:
    if not 0 < file.size < 512 or (file.compression is None and suffix_kind(file.path) == "text"):
        return False
    with open(file.path, "rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def _refuse_twice(path: str, paths: list[str]) -> None:
    seen: dict[str, str] = {}
    for file in paths:
        first = seen.setdefault(os.path.realpath(file), file)
        if first != file:
            raise _error(
                path,
                f"{first} and {file} are the same file, which would be read twice",
                "leave out one of them",
            )


def _kind_of(path: str, paths: list[str]) -> Kind:
    kinds = {suffix_kind(file) for file in paths}
    if len(kinds) == 1 and None not in kinds:
        return next(kind for kind in kinds if kind is not None)
    unclear = next((file for file in paths if suffix_kind(file) is None), None)
    problem = (
        f"the suffix of {unclear} does not say what it holds"
        if unclear is not None
        else f"holds both {' and '.join(sorted(_TITLES[kind] for kind in kinds if kind))} files"
    )
    fix = 'set training.dataset to "json", "text" or "parquet", or narrow the path'
    raise _error(path, problem, fix)


def _error(path: str, problem: str, fix: str, missing_asset: bool = False) -> ConfigError:
    return ConfigError(Problem(KEY, problem, fix, value=path, missing_asset=missing_asset))
