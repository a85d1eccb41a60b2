"""Tokenised documents on disk: how shards of them are written, checked and read.

A folder holds `index.json` and, for each shard, two files:

- `00000.bin`: the tokens of its documents, one after another, little-endian `uint16` or `uint32`;
  each document between its start and end token.
- `00000.idx`: a safetensors file with `offsets` (`[num_documents + 1]`, in tokens) and `sizes`
  (`[num_documents]`, bytes of the rows that the documents were made of). Where some are pieces of a
  longer document it also holds `borders` (`[num_documents]`): 1 where a document begins, plus 2
  where it ends. Its header says how many tokens there are, which job made them, and the digest of
  the `.bin`.

Files appear under their name when they are whole and on the disk, the `.idx` after the `.bin`, the
index last of all. A row without text is a document without tokens: it keeps its place in the order.
No torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from torchtitan.utils.files import replace_file

FORMAT = "torchtitan-tokens"
VERSION = 1
INDEX_NAME = "index.json"
JOB_NAME = "job.json"
_CHUNK_BYTES = 1 << 22
_WRITE_AGAIN = "run `torchtitan tokenize` again with another --output, or copy the folder again"


class TokenFileError(ValueError):
    """A file is not what its index says; the message names it."""

    def __init__(self, problem: str, fix: str = _WRITE_AGAIN, missing: bool = False):
        super().__init__(problem)
        self.fix = fix
        self.missing = missing
        """The folder does not exist."""


@dataclass(frozen=True)
class ShardInfo:
    """The entry of a shard in the index."""

    name: str
    num_documents: int
    """Empty documents included."""
    num_tokens: int
    bad_rows: int
    """Skipped rows; each is an empty document."""
    bin_sha256: str
    idx_sha256: str
    idx_bytes: int
    pieces: tuple[int, ...]
    """Numbers of the documents at which a new piece of the source begins, from 0 to the end."""


@dataclass(frozen=True)
class TokenIndex:
    """`index.json`."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: str
    """`uint16` or `uint32`."""
    vocab_size: int
    num_lanes: int
    """`data.lanes` for which the pieces were cut: with as many, a run reads what it would have read
    from the text."""
    job: str
    """Names what was made of what, so that the same is not begun again."""
    source: Any
    """Description of the source that was read."""
    shards: tuple[ShardInfo, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of a stored token."""
        return np.dtype(self.dtype).itemsize

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all shards, empty ones included."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def bad_rows(self) -> int:
        """Rows that were left out."""
        return sum(shard.bad_rows for shard in self.shards)

    @property
    def digest(self) -> str:
        """Names the tokens and how they are cut, wherever they lie."""
        facts = [asdict(shard) for shard in self.shards]
        return hashlib.sha256(json.dumps([self.dtype, self.num_lanes, facts]).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the content of `index.json`."""
        counts = {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "bad_rows": self.bad_rows,
        }
        content = {"format": FORMAT, "version": VERSION, "counts": counts, **asdict(self)}
        return json.dumps(content, indent=1) + "\n"


def token_dtype(vocab_size: int) -> str:
    """Return the smallest type that holds all ids."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def is_token_folder(path: str) -> bool:
    """Tell whether `path` is a folder of tokens, finished or not, or the index of one."""
    folder = token_folder(path)
    for name in (INDEX_NAME, JOB_NAME):
        try:
            with open(folder / name, "rb") as stream:
                start = stream.read(100)  # data of any size may be called so
        except OSError:
            continue
        if f'"format": "{FORMAT}"'.encode() in start:
            return True
    return False


def token_folder(path: str) -> Path:
    """Return the folder that a path to it, or to its index, means."""
    given = Path(os.path.expanduser(path))
    return given.parent if given.name == INDEX_NAME else given


def read_index(folder: Path) -> TokenIndex:
    """Return the index of a folder. Raises TokenFileError."""
    file = folder / INDEX_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        if (folder / JOB_NAME).is_file():
            raise TokenFileError(
                f"{folder} is not finished; the same `torchtitan tokenize` goes on with it",
                "let `torchtitan tokenize` come to its end",
            ) from None
        fix = 'correct the path, write it with `torchtitan tokenize`, or set dataset = "auto"'
        if not folder.exists():
            problem = f"there is no folder {folder.absolute()}"
            raise TokenFileError(problem, fix, missing=True) from None
        if not file.exists():
            raise TokenFileError(f"{folder.absolute()} holds no {INDEX_NAME}", fix) from None
        raise TokenFileError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TokenFileError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise TokenFileError(f"{file} is not an index of tokens")
    version = content.pop("version", None)
    if version != VERSION:
        raise TokenFileError(f"{file} is of format version {version}; this program reads {VERSION}")
    try:
        shards = tuple(
            ShardInfo(**{**shard, "pieces": tuple(shard["pieces"])}) for shard in content["shards"]
        )
        counts = content.pop("counts")
        index = TokenIndex(**{**content, "shards": shards})
        damaged = counts["num_tokens"] != index.num_tokens
        # Names become paths: what did not come from here must not lead elsewhere.
        named = all(shard.name.isdigit() for shard in shards)
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenFileError(f"{file} is damaged: {error}") from None
    if damaged or not named or index.dtype not in ("uint16", "uint32"):
        raise TokenFileError(f"{file} is damaged")
    return index


def check_sizes(folder: Path, index: TokenIndex) -> None:
    """Compare the sizes of all files with the index. Raises TokenFileError."""
    for shard in index.shards:
        for file, wanted in (
            (folder / f"{shard.name}.bin", shard.num_tokens * index.token_bytes),
            (folder / f"{shard.name}.idx", shard.idx_bytes),
        ):
            try:
                size = file.stat().st_size
            except OSError as error:
                raise TokenFileError(f"{file} cannot be read: {error.strerror}") from None
            if size != wanted:
                kind = "is cut short" if size < wanted else "is too long"
                raise TokenFileError(f"{file} {kind}: {size} bytes, the index says {wanted}")


def check_digests(folder: Path, index: TokenIndex, max_bytes: float) -> None:
    """Compare the digests of files with the index, the smallest files first.

    Reads at most `max_bytes`. Raises TokenFileError.
    """
    files = [
        item
        for shard in index.shards
        for item in (
            (shard.idx_bytes, folder / f"{shard.name}.idx", shard.idx_sha256),
            (shard.num_tokens * index.token_bytes, folder / f"{shard.name}.bin", shard.bin_sha256),
        )
    ]
    for size, file, digest in sorted(files, key=lambda item: (item[0], item[1])):
        max_bytes -= size
        if max_bytes < 0:
            return
        if file_digest(file) != digest:
            raise TokenFileError(f"{file} is damaged: its content is not what the index says")


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(_CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Documents:
    """A shard, mapped into memory."""

    tokens: np.ndarray
    """`[num_tokens]`."""
    offsets: np.ndarray
    """uint64 `[num_documents + 1]`."""
    sizes: np.ndarray
    """uint32 `[num_documents]`."""
    borders: np.ndarray | None
    """uint8 `[num_documents]`; None where all are whole documents."""


def open_documents(folder: Path, index: TokenIndex, shard: ShardInfo) -> Documents:
    """Map a shard into memory. Raises TokenFileError if it does not fit the index."""
    file = folder / f"{shard.name}.idx"
    try:
        with safe_open(file, framework="numpy") as stored:
            offsets, sizes = stored.get_tensor("offsets"), stored.get_tensor("sizes")
            pieces = "borders" in stored.keys()  # noqa: SIM118 (it is no dict)
            borders = stored.get_tensor("borders") if pieces else None
        tokens = np.empty(0, dtype=np.dtype(index.dtype))
        if shard.num_tokens:
            file = folder / f"{shard.name}.bin"
            dtype = np.dtype(index.dtype).newbyteorder("<")
            tokens = np.memmap(file, dtype=dtype, mode="r")
    except (OSError, SafetensorError, ValueError) as error:
        raise TokenFileError(f"{file} cannot be read: {error}") from None
    whole = len(tokens) == shard.num_tokens and len(sizes) == shard.num_documents
    whole = whole and (borders is None or len(borders) == len(sizes))
    if not whole or len(offsets) != len(sizes) + 1 or offsets[-1] != shard.num_tokens:
        raise TokenFileError(f"{file} does not fit its index; tokens must not change during a run")
    return Documents(tokens, offsets, sizes, borders)


class Document(NamedTuple):
    """A row as it is written."""

    tokens: np.ndarray
    """int32 `[num_tokens]`; none of a row without text."""
    size: int
    """Bytes of the row."""
    bad: bool = False
    """The row was skipped."""
    begins: bool = True
    """See `Row`."""
    ends: bool = True
    """See `Row`."""


def write_shard(
    folder: Path, name: str, dtype: str, pieces: Iterable[Iterable[Document]], job: str
) -> None:
    """Write the documents of some pieces of the source."""
    stored_type = np.dtype(dtype).newbyteorder("<")
    digest = hashlib.sha256()
    ends, sizes, starts_of_pieces, bad_rows = [0], [], [0], 0
    borders = bytearray()
    with replace_file(folder / f"{name}.bin") as stream:
        for piece in pieces:
            for document in piece:
                content = document.tokens.astype(stored_type).tobytes()
                digest.update(content)
                stream.write(content)
                ends.append(ends[-1] + len(document.tokens))
                sizes.append(min(document.size, 2**32 - 1))
                borders.append(document.begins + 2 * document.ends)
                bad_rows += document.bad
            starts_of_pieces.append(len(sizes))
    facts = {
        "job": job,
        "num_tokens": ends[-1],
        "bad_rows": bad_rows,
        "bin_sha256": digest.hexdigest(),
        "pieces": starts_of_pieces,
    }
    arrays: dict[str, np.ndarray] = {
        "offsets": np.array(ends, dtype=np.uint64),
        "sizes": np.array(sizes, dtype=np.uint32),
    }
    if set(borders) - {3}:
        arrays["borders"] = np.frombuffer(borders, dtype=np.uint8)
    with replace_file(folder / f"{name}.idx") as stream:
        # One entry: the order of several would be another in every process.
        stream.write(save(arrays, metadata={"shard": json.dumps(facts)}))


def finished_shard(folder: Path, name: str, dtype: str, job: str) -> ShardInfo | None:
    """Return what `write_shard` finished for this job; None for anything else."""
    bin_file, idx_file = folder / f"{name}.bin", folder / f"{name}.idx"
    try:
        with safe_open(idx_file, framework="numpy") as stored:
            facts = json.loads((stored.metadata() or {})["shard"])
        num_tokens, borders = facts["num_tokens"], facts["pieces"]
        if facts["job"] != job:
            return None
        if bin_file.stat().st_size != num_tokens * np.dtype(dtype).itemsize:
            return None
        return ShardInfo(
            name=name,
            num_documents=borders[-1],
            num_tokens=num_tokens,
            bad_rows=facts["bad_rows"],
            bin_sha256=facts["bin_sha256"],
            idx_sha256=file_digest(idx_file),
            idx_bytes=idx_file.stat().st_size,
            pieces=tuple(borders),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
