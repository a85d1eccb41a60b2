"""The manifest: the one file that makes a folder a checkpoint. No torch.

`manifest.json` lists every file of a checkpoint with its size and digest, and what is needed to
judge the checkpoint without reading a tensor: run, step, names, shapes and types of the tensors,
config, mesh, versions, and the JSON state of everything that is not a tensor. It ends with a digest
of itself. PyTorch's own format does not notice a flipped bit, and a truncated file only after parts
of the model were overwritten; the manifest reveals both before anything is loaded.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from torchtitan.checkpoint.files import open_regular
from torchtitan.utils.text import some_of

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
"""Format 1 has SHA-256 digests of files, under `sha256`."""
OPTIMIZER_PREFIX = "optimizer."
"""The prefix of the names of optimizer state, and of nothing else."""
HANDLER_PREFIX = "handler_state."
"""The prefix, before the handler's name, of the names of tensors that a model handler keeps."""
HANDLERS_STATE = "handlers"
"""The key in the JSON state of what handlers keep apart from tensors."""
BASE_STATE = "base"
"""The key in the JSON state of the path and digest of weights that are not in the checkpoint."""
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_MAX_MANIFEST_BYTES = 256 * 2**20
_CHUNK_BYTES = 4 * 2**20
_THREADS = 4
_SHA_256 = "sha256:"
# For damage, not for forgers, who can write a manifest as well: it costs a save next to nothing.
_XXH3 = "xxh3_128:"
_ALGORITHMS: dict[str, Callable[[], Any]] = {_SHA_256: hashlib.sha256, _XXH3: xxhash.xxh3_128}


class InvalidCheckpoint(Exception):
    """A folder is not a valid checkpoint; the message says why and names the file."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and digest of a file as it was written."""

    size: int
    digest: str
    """Hexadecimal, after `sha256:` or `xxh3_128:`."""


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint; `info` holds the run's config, mesh and versions."""

    run_id: str
    step: int
    model_only: bool
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, dict[str, Any]]
    """By name: `dtype` (such as `float32`) and `shape` (a list of int)."""
    state: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """The bytes of all files."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True)
class RunState:
    """The state of a run after a step, apart from its tensors."""

    step: int = 0
    num_tokens_seen: int = 0
    lane_states: Mapping[str, dict[str, Any]] | None = None
    """By number, of all lanes; None at the start of the data."""
    data_fingerprint: str | None = None
    data_summary: Mapping[str, Any] | None = None
    """The facts behind the fingerprint, to report differences."""
    reference_digest: str | None = None
    """The weights that the loss compares with; None for the initial ones, and for other losses."""
    skipped_steps: int = 0
    """Steps whose update was left out because they were not finite, or were spikes."""
    recent_losses: Sequence[float] | None = None
    """The last ones, by which the next one is a spike or not; None without detection."""
    data_step: int | None = None
    """Steps that the data have given, those left out included; None (older releases): `step`."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync `folder/manifest.json`; the folder must not hold one."""
    body = {"format": FORMAT_VERSION, **manifest_to_json(manifest)}
    text = json.dumps({**body, "digest": _digest(body)}, indent=1)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(folder / MANIFEST_NAME, flags, 0o664), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and verify its own digest. Raises `InvalidCheckpoint`."""
    path = folder / MANIFEST_NAME
    try:
        with open_regular(path) as file:
            raw = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: {error.strerror or error}") from error
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise InvalidCheckpoint(f"{path}: larger than any manifest")
    try:
        body = json.loads(raw)
        digest = body.pop("digest")
        version = body.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: damaged") from error
    if type(version) is not int or version > FORMAT_VERSION:
        text = f"format {version!r} is newer than the {FORMAT_VERSION} this version reads"
        raise InvalidCheckpoint(f"{path}: {text}; update torchtitan")
    if digest != _digest({"format": version, **body}):
        raise InvalidCheckpoint(f"{path}: its content does not match its own digest")
    return _parse(path, body)


def manifest_differences(manifest: Manifest, ranks: Sequence[Mapping[str, dict[str, Any]]]) -> str:
    """Describe how the tensors of all ranks (as in `Manifest.tensors`) differ from a manifest's.

    The text is empty if the ranks together have exactly its tensors.
    """
    wanted = {name for tensors in ranks for name in tensors}
    if manifest.model_only and any(name.startswith(OPTIMIZER_PREFIX) for name in wanted):
        return "it holds the model only, no optimizer state to continue from"
    return tensor_differences(manifest.tensors, ranks)


def tensor_differences(
    saved: Mapping[str, dict[str, Any]], ranks: Sequence[Mapping[str, dict[str, Any]]]
) -> str:
    """Describe how the tensors of all ranks together differ from saved ones."""
    wanted = {name for tensors in ranks for name in tensors}
    texts = [
        f"{name} is {_show(saved[name])} in it, {_show(entry)} in the run"
        for tensors in ranks
        for name, entry in tensors.items()
        if name in saved and saved[name] != entry
    ]
    ties = _EMBEDDING in saved and _HEAD in wanted
    hint = " (if it is the embedding, set model.args.tied_embeddings = true)"
    texts += [
        f"{name} is not in it{hint if ties and name == _HEAD else ''}"
        for name in sorted(wanted)
        if name not in saved
    ]
    texts += [f"{name} is only in it" for name in saved if name not in wanted]
    return some_of(list(dict.fromkeys(texts)), most=8, separator="; ")


def base_of(manifest: Manifest | None) -> dict[str, str] | None:
    """Return `path` and `digest` of the base that a checkpoint refers to; None for a whole one."""
    base: dict[str, str] | None = None if manifest is None else manifest.state.get(BASE_STATE)
    return base


def select_tensors(manifest: Manifest, of_handlers: bool) -> Manifest:
    """Return `manifest` with the tensors of handlers only, or with all but these."""
    tensors = {
        name: entry
        for name, entry in manifest.tensors.items()
        if name.startswith(HANDLER_PREFIX) == of_handlers
    }
    return replace(manifest, tensors=tensors)


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as JSON values, to send to other ranks."""
    return asdict(manifest)


def manifest_from_json(body: dict[str, Any]) -> Manifest:
    """Return the manifest that `manifest_to_json` made JSON values of."""
    files = {name: file_record(record) for name, record in body["files"].items()}
    return Manifest(**{**body, "files": files})


def file_record(entry: Mapping[str, Any]) -> FileRecord:
    """Return the record of a file from its entry in a manifest, of this format or an older one."""
    return FileRecord(
        entry["size"], entry["digest"] if "digest" in entry else _SHA_256 + entry["sha256"]
    )


def record_file(path: Path) -> FileRecord:
    """Sync a file to disk, and digest what can be read back from it."""
    with open_regular(path) as file:
        os.fsync(file.fileno())
        return _record(file, _XXH3)


def sha256_of(path: Path) -> tuple[int, str]:
    """Return size and SHA-256 of another program's file. Follows links, as caches have them."""
    with path.open("rb") as file:
        record = _record(file, _SHA_256)
    return record.size, record.digest.removeprefix(_SHA_256)


def verify_file(
    path: Path, expected: FileRecord, on_read: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Raise `InvalidCheckpoint` unless the file is, to the byte, the one that was recorded.

    `on_read` is told the bytes that were read since its last call.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.size:
                raise InvalidCheckpoint(f"{path}: {size} bytes, written were {expected.size}")
            algorithm = expected.digest.partition(":")[0] + ":"
            if _record(file, algorithm, on_read).digest != expected.digest:
                raise InvalidCheckpoint(f"{path}: content differs from what was written")
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: {error.strerror or error}") from error


def damaged_files(
    files: Mapping[Path, FileRecord], on_read: Callable[[int], None] = lambda num_bytes: None
) -> dict[Path, str]:
    """Return what `verify_file` finds wrong, by path; a few threads read several files at a time.

    An exception, such as Ctrl-C, does not wait for files of many GiB.
    """
    is_over = False

    def read(num_bytes: int) -> None:
        if is_over:
            raise InvalidCheckpoint("stopped")
        on_read(num_bytes)

    def fault(path: Path) -> str:
        try:
            verify_file(path, files[path], read)
        except InvalidCheckpoint as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        try:
            faults = dict(zip(files, threads.map(fault, files)))
        finally:
            is_over = True
    return {path: text for path, text in faults.items() if text}


def verify_share(folder: Path, manifest: Manifest, rank: int, world_size: int) -> None:
    """Call `verify_file` for this rank's share of the files, the largest ones first."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    for name in by_size[rank::world_size]:
        verify_file(folder / name, manifest.files[name])


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Raise `InvalidCheckpoint` unless exactly the listed files are there, with their sizes."""
    try:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except OSError as error:
        raise InvalidCheckpoint(f"{folder}: {error.strerror or error}") from error
    present.pop(MANIFEST_NAME, None)
    missing = sorted(set(manifest.files) - set(present))
    if missing:
        raise InvalidCheckpoint(f"{folder / missing[0]}: missing ({len(missing)} files are)")
    # Unlisted shards mean that two checkpoints were mixed. Other files (notes, .nfs) are not ours.
    foreign = sorted(name for name in set(present) - set(manifest.files) if _is_shard(name))
    if foreign:
        raise InvalidCheckpoint(f"{folder / foreign[0]}: is not listed in the manifest")
    for name, record in manifest.files.items():
        status = present[name]
        if not stat.S_ISREG(status.st_mode):
            raise InvalidCheckpoint(f"{folder / name}: is not a regular file")
        if status.st_size != record.size:
            text = f"{status.st_size} bytes, written were {record.size}"
            raise InvalidCheckpoint(f"{folder / name}: {text}")


def _parse(path: Path, body: dict[str, Any]) -> Manifest:
    try:
        manifest = manifest_from_json(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{path}: lacks a part ({error})") from error
    for name, record in manifest.files.items():
        if os.path.basename(name) != name or name in ("", ".", "..", MANIFEST_NAME) or "\0" in name:
            raise InvalidCheckpoint(f"{path}: lists {name!r}, which is not a plain file name")
        known = type(record.digest) is str and record.digest.startswith(tuple(_ALGORITHMS))
        if type(record.size) is not int or not known:
            raise InvalidCheckpoint(f"{path}: the entry of {name!r} is damaged")
    if type(manifest.step) is not int or type(manifest.run_id) is not str:
        raise InvalidCheckpoint(f"{path}: step or run id is damaged")
    return manifest


def _is_shard(name: str) -> bool:
    return name.endswith(".distcp") or name == ".metadata"


def _show(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']} {entry['shape']}"


def _record(
    file: Any, algorithm: str, on_read: Callable[[int], None] = lambda num_bytes: None
) -> FileRecord:
    digest, size, buffer = _ALGORITHMS[algorithm](), 0, bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        digest.update(view[:count])
        size += count
        on_read(count)
    return FileRecord(size, algorithm + digest.hexdigest())


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
