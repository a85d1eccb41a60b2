"""The files of a dataset: finding them, and reading plain and compressed ones as bytes."""

import codecs
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Literal

from torchtitan.config import ConfigError, DataError, Problem
from torchtitan.data.decode import MAGIC_BYTES, compression_of, decompressed, looks_like_text

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
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
}


@dataclass(frozen=True)
class DataFile:
    """A file as it was when the run started; reading notices when it has changed."""

    path: str
    size: int
    """Bytes on disk."""

    @cached_property
    def compression(self) -> str | None:
        """How the file is compressed, by its content and then its suffix. Raises DataError."""
        by_suffix = COMPRESSIONS.get(os.path.splitext(self.path)[1].lower())
        if by_suffix is not None and looks_like_text(self.start):
            return None  # as where a download was decompressed on its way
        return compression_of(self.start) or by_suffix

    @cached_property
    def start(self) -> bytes:
        """The first bytes on the disk. Raises DataError."""
        try:
            with open(self.path, "rb") as file:
                return file.read(MAGIC_BYTES)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error

    def open(self, max_window_bytes: int = 2**31) -> BinaryIO:
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
        return decompressed(file, self.compression, max_window_bytes)


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
    """What the suffix says about a file, looking through that of a compression."""
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
