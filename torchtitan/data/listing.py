"""Finding the files of a dataset, and keeping account of those that are left out.

Folders are listed with one system call for each file, as one may hold hundreds of thousands on a
file system of the network.
"""

import errno
import glob
import os
import stat
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import cast

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.data.files import COMPRESSIONS, KEY, SUFFIXES, DataFile, Kind, suffix_kind
from torchtitan.utils.environment import is_quiet_rank

_TITLES: dict[Kind, str] = {"json": "JSON", "text": "text", "parquet": "Parquet"}
_POINTER = b"version https://git-lfs"
"""Start of a Git LFS pointer, which stands for a file that was not fetched yet."""
_UNREADABLE = (".lz4", ".br", ".7z", ".zip", ".rar", ".lz", ".lzma", ".lzo", ".sz", ".z", ".tar")
"""Suffixes of what could hold a data file that is not read."""
HIDDEN = 'beginning with "." or "_"'
OTHER_KIND = "of another kind"
EMPTY = "empty"
IRREGULAR = "not regular"
LINKED = "links to folders"
_SILENT_SECONDS = 3.0
_MOST_EXAMPLES = 3
LeftOut = Mapping[str, Counter[str]]
"""Files that are not read, by the reason: names, or suffixes, and how many there are of each."""


@dataclass(frozen=True)
class Listing:
    """The files that a path, folder or glob stands for."""

    kind: Kind
    files: list[DataFile]
    left_out: LeftOut
    doubles: list[tuple[str, str]]
    """Pairs that seem to hold the same, by their names."""


_known: dict[tuple[str, str], Listing] | None = None


@contextmanager
def listed_once() -> Iterator[None]:
    """List each path only once while entered."""
    global _known
    _known = {}
    try:
        yield
    finally:
        _known = None


def list_files(path: str, kind: str) -> Listing:
    """List what a path, folder or glob stands for, sorted, and tell its kind.

    Empty files are left out. Raises ConfigError: nothing there, nothing but empty files, one file
    under two names, or (with "auto") suffixes that do not tell the kind.
    """
    if _known is None:
        return _list_files(path, kind)
    if (path, kind) not in _known:
        _known[path, kind] = _list_files(path, kind)
    return _known[path, kind]


def _list_files(path: str, kind: str) -> Listing:
    left_out: dict[str, Counter[str]] = defaultdict(Counter)
    found = _found(path, kind, left_out)
    _refuse_twice(path, found)
    known = _kind_of(path, list(found)) if kind == "auto" else cast(Kind, kind)
    files = []
    for name, status in found.items():
        if not os.access(name, os.R_OK):
            raise _error(path, f"no permission to read {name}", "change the file's permissions")
        if not status.st_size:
            left_out[EMPTY][os.path.basename(name)] += 1
            continue
        files.append(DataFile(name, status.st_size))
        if _is_pointer(files[-1]):
            problem = f"{name} only stands for a file that Git LFS has not fetched"
            raise _error(path, problem, "run `git lfs pull` in the folder of the data")
    if not files:
        raise _error(path, f"all {len(found)} files are empty", "give files with content")
    return Listing(known, files, dict(left_out), list(_by_name(files)))


def describe_left_out(left_out: LeftOut) -> str:
    """Return what is left out and why, as a part of a sentence; empty for nothing."""
    parts = [
        f"{names.total():,} {reason} ({', '.join(islice(names, _MOST_EXAMPLES))})"
        for reason, names in sorted(left_out.items())
    ]
    return f"left out: {', '.join(parts)}" if parts else ""


def _found(path: str, kind: str, left_out: dict[str, Counter[str]]) -> dict[str, os.stat_result]:
    """The regular files by name, sorted."""
    expanded = os.path.expanduser(path)
    try:
        status = os.stat(expanded)
    except OSError as error:
        return _globbed(path, expanded, left_out, error)
    if stat.S_ISREG(status.st_mode):
        return {expanded: status}
    if not stat.S_ISDIR(status.st_mode):
        problem = f"{os.path.abspath(expanded)} is neither a file nor a folder"
        raise _error(path, problem, "write the data to a file, and name that")
    found = dict(sorted(_walk(path, expanded, kind, left_out)))
    if not found:
        suffixes = [name for name, of in SUFFIXES.items() if kind in ("auto", of)]
        wanted = "files" if kind == "text" else f"{', '.join(suffixes)} files"
        rest = describe_left_out(left_out)
        problem = f"the folder holds no {wanted}{f'; {rest}' if rest else ''}"
        raise _error(path, problem, "name the files by a glob")
    return found


def _globbed(
    path: str, expanded: str, left_out: dict[str, Counter[str]], error: OSError
) -> dict[str, os.stat_result]:
    found = {}
    for name in sorted(glob.glob(expanded, recursive=True)) if glob.has_magic(expanded) else ():
        status = _status(path, name)
        if stat.S_ISREG(status.st_mode):
            found[name] = status
        elif not stat.S_ISDIR(status.st_mode):
            left_out[IRREGULAR][os.path.basename(name)] += 1
    if found:
        return found
    where = os.path.abspath(expanded)
    if glob.has_magic(expanded):
        raise _error(
            path, f"no file matches {where}", "put files there, or name others", missing_asset=True
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.islink(expanded):
        raise _error(path, f"{where} does not exist", "correct the path", missing_asset=True)
    raise _error(path, _reason(where, error), "correct the path, or what it leads to")


def _walk(
    path: str, folder: str, kind: str, left_out: dict[str, Counter[str]]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the regular files below a folder that fit.

    Hidden names, such as `.git` and `.cache`, are left out.
    """
    folders, count, due = [folder], 0, time.monotonic() + _SILENT_SECONDS
    while folders:
        for entry in _scan(path, folders.pop()):
            is_folder, is_hidden = _is_folder(entry), entry.name.startswith((".", "_"))
            if is_hidden:
                left_out[HIDDEN][entry.name + "/" * is_folder] += 1
            elif is_folder and entry.is_symlink():
                left_out[LINKED][f"{entry.name}/"] += 1
            elif is_folder:
                folders.append(entry.path)
            elif not _fits(entry.name, kind):
                _refuse_unread(path, entry, kind)
                left_out[OTHER_KIND][os.path.splitext(entry.name)[1] or entry.name] += 1
            else:
                status = _status(path, entry.path)
                if stat.S_ISREG(status.st_mode):
                    yield entry.path, status
                else:
                    left_out[IRREGULAR][entry.name] += 1
            count += 1
            if count % 1024 == 0 and time.monotonic() >= due and not is_quiet_rank():
                due += _SILENT_SECONDS
                text = f"notice: listing {folder}: {count:,} files so far"
                print(text, file=sys.stderr, flush=True)


def _scan(path: str, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _error(path, _reason(folder, error), "change its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links; reported when its file is opened
        return False


def _status(path: str, name: str) -> os.stat_result:
    try:
        return os.stat(name)
    except OSError as error:
        raise _error(path, _reason(name, error), "correct or remove it") from None


def _reason(name: str, error: OSError) -> str:
    """Return why `name` cannot be found or read."""
    if error.errno == errno.ENOENT and os.path.islink(name):
        return f"{name} is a link to {os.readlink(name)}, which does not exist"
    return f"{name} cannot be read: {error.strerror}"


def _fits(name: str, kind: str) -> bool:
    found = suffix_kind(name)
    return kind == "text" or (found is not None if kind == "auto" else found == kind)


def _refuse_unread(path: str, entry: os.DirEntry[str], kind: str) -> None:
    """A file of the wanted kind that is packed in a way that is not read must not go missing."""
    stem, suffix = os.path.splitext(entry.name.lower())
    inner = SUFFIXES.get(os.path.splitext(stem)[1])
    if suffix in _UNREADABLE and inner is not None and kind in ("auto", inner):
        known = ", ".join(COMPRESSIONS)
        fix = f"compress it as one of {known}, unpack it, or name the other files by a glob"
        raise _error(path, f"{entry.path} is packed as {suffix}, which is not read", fix)


def _is_pointer(file: DataFile) -> bool:
    if not 0 < file.size < 512 or (file.compression is None and suffix_kind(file.path) == "text"):
        return False
    with open(file.path, "rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def _refuse_twice(path: str, found: Mapping[str, os.stat_result]) -> None:
    seen: dict[tuple[int, int], str] = {}
    for name, status in found.items():
        # Some file systems of the network number nothing.
        first = seen.setdefault((status.st_dev, status.st_ino), name) if status.st_ino else name
        if first != name and os.path.realpath(first) == os.path.realpath(name):
            problem = f"{first} and {name} are the same file, which would be read twice"
            raise _error(path, problem, "leave out one of them")


def _by_name(files: Iterable[DataFile]) -> Iterator[tuple[str, str]]:
    """Files that have the same name but for the suffix of a compression."""
    seen: dict[str, str] = {}
    for file in files:
        stem, suffix = os.path.splitext(file.path)
        first = seen.setdefault(stem if suffix.lower() in COMPRESSIONS else file.path, file.path)
        if first != file.path:
            yield first, file.path


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
    fix = 'set dataset to "json", "text" or "parquet", or narrow the path'
    raise _error(path, problem, fix)


def _error(path: str, problem: str, fix: str, missing_asset: bool = False) -> ConfigError:
    return ConfigError(ConfigIssue(KEY, problem, fix, value=path, missing_asset=missing_asset))
