"""Text to token ids and back.

`bytes` needs no file: a token is a byte of UTF-8. The other formats are files, each read with the
library that made it: `tokenizer.json` (tokenizers) and `tokenizer.model` (tiktoken or
sentencepiece). The format is detected from the content, not the name.

More are added with `register_tokenizer`, or by an entry point of the group `torchtitan.tokenizers`
that names such a function; `model.tokenizer_path` is then their name, or `name:path`.

Documents are data: the text of a special token inside a document is encoded as ordinary text, so no
document can forge a boundary.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.registry import Registry, calling_module
from torchtitan.data.document_ends import NoToken, SpecialTokens, read_special_tokens
from torchtitan.data.tiktoken_model import TiktokenTokenizer
from torchtitan.data.tokenizer_formats import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
)

KEY = "model.tokenizer_path"
_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
"""Looked for in a folder, in this order. The last is where Meta's repositories have it."""
_MOST_BYTES = 256 * 2**20
"""No tokenizer is larger; the weights of a model are."""
_DOWNLOAD = (
    "download one, for example with `torchtitan download --repo_id meta-llama/Llama-3.1-8B"
    ' --local_dir DIR`, or use "bytes", which needs no file'
)


class Tokenizer(Protocol):
    """The interface of a tokenizer. Picklable, for worker processes.

    Four members are optional: `ends` (an `Ends`) says which of its two tokens go around a
    document, both without it; `token_name(id)` is the text of a special token, for messages;
    `special_ids` are the ids of special tokens by their text, and `folder` is where its files lie,
    both for chat templates.
    """

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The start token, if there is one."""

    @property
    def eos_id(self) -> int:
        """The end token."""

    @property
    def pad_id(self) -> int | None:
        """The padding token, if there is one."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could give other ids."""
        ...

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`, with the start and end token where asked for and existent."""
        ...

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        """`encode` as int32 `[num_tokens]`, without a Python object a token where possible."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`; special tokens have none."""
        ...


_OfFile = JsonTokenizer | TiktokenTokenizer | SentencePieceTokenizer
TokenizerFactory = Callable[[str], Tokenizer]
"""Builds the tokenizer of what follows `name:` in `model.tokenizer_path`, or of an empty text.
Raises ConfigError for errors that the user can correct."""


def _factory(name: str, thing: Any) -> TokenizerFactory:
    if not callable(thing):
        raise TypeError(f"the tokenizer {name} is not a function of a path")
    return thing  # type: ignore[no-any-return]


TOKENIZERS: Registry[TokenizerFactory] = Registry(KEY, "torchtitan.tokenizers", _factory)


def register_tokenizer(name: str, factory: TokenizerFactory) -> None:
    """Register a tokenizer as `model.tokenizer_path = name` (or `name:path`).

    Raises ValueError for a taken name, or one that could be a path.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} looks like a path")
    TOKENIZERS.register(name, factory, calling_module())


def build_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer at `path`: a registered one such as `bytes`, a file, or a folder.

    Raises ConfigError naming the files looked for, or the file that is broken.
    """
    name, _, rest = path.partition(":")
    if name in TOKENIZERS:
        return TOKENIZERS[name](rest)
    given = Path(os.path.expanduser(path))
    looked_for = [given / name for name in _FILES]
    if not given.is_dir():
        looked_for = [given] if given.suffix else [given, *looked_for]
    file = next(filter(Path.is_file, looked_for), None)
    if file is None:
        raise ConfigError(_not_found(path, given, looked_for))
    try:
        special = read_special_tokens(file.parent)
    except ValueError as error:
        raise ConfigError(ConfigIssue(KEY, str(error), "download the file again", path)) from None
    tokenizer = _read(file, path, special)
    tokenizer.folder = file.parent
    return tokenizer


def _read(file: Path, path: str, special: SpecialTokens) -> _OfFile:
    """Return the tokenizer in `file`, by its content; `path` is what the user set."""
    try:
        size = file.stat().st_size
        content = file.read_bytes() if size <= _MOST_BYTES else b""
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror}"
        raise ConfigError(ConfigIssue(KEY, problem, "make it readable", value=path)) from None
    kinds = [k for k in (TiktokenTokenizer, SentencePieceTokenizer) if k.recognises(content)]
    is_json = file.suffix == ".json" or content.lstrip().startswith(b"{")
    try:
        if is_json:
            return JsonTokenizer(file.read_text(encoding="utf-8"), special)
        if kinds:
            return kinds[0](content, special)
    except NoToken as error:
        problem = f"{file} has no {error.which}-of-text token ({error})"
        fix = f'correct "{error.key}" in tokenizer_config.json, or in special_tokens_map.json'
    except Exception as error:  # the library of tokenizer.json raises bare Exception
        problem = f"{file} is not a readable tokenizer: {error}"
        fix = "download the file again, or use another one"
    else:
        problem = f"{file} is no tokenizer: it is {_in_words(content, size)}"
        fix = _DOWNLOAD
    raise ConfigError(ConfigIssue(KEY, problem, fix, value=path))


def _in_words(content: bytes, size: int) -> str:
    """Describe a file that was taken for a tokenizer."""
    if size > _MOST_BYTES:
        return f"{size / 2**20:,.0f} MiB large"
    if not content:
        return "empty"
    if content.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, in place of a file that has not been fetched"
    if content.lstrip().startswith(b"<"):
        return "a web page"
    return "neither a tokenizer.json nor a model of tiktoken or sentencepiece"


def _not_found(path: str, given: Path, looked_for: list[Path]) -> ConfigIssue:
    others = sorted(given.glob("*")) if given.is_dir() else []
    # GPT-2's two files, and models under names of their own.
    others = [file for file in others if file.name == "vocab.json" or file.suffix == ".model"]
    if others:
        found = ", ".join(str(file) for file in others)
        problem = f"found {found}, but none of {', '.join(_FILES)}"
        fix = f"name the file itself, if it is a tokenizer.model; or {_DOWNLOAD}"
        return ConfigIssue(KEY, problem, fix, value=path)
    names = ", ".join(str(file.absolute()) for file in looked_for)
    problem = f"there is no tokenizer; looked for {names}"
    return ConfigIssue(KEY, problem, _DOWNLOAD, value=path, missing_asset=True)


def _bytes(path: str) -> ByteTokenizer:
    """One token a byte of UTF-8; needs no file."""
    return ByteTokenizer()


TOKENIZERS.add_built_in("bytes", _bytes)
