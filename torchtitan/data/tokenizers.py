"""Text to token ids and back.

`bytes` needs no file: a token is a byte of UTF-8. The others are files, each read with the library
that made it: `tokenizer.json` (tokenizers), and `tokenizer.model`, which may be tiktoken's or
sentencepiece's. What a file is, its content tells (`build_tokenizer`), not its name.

Others join with `register_tokenizer`, or by an entry point of the group `torchtitan.tokenizers`
that gives such a function; `model.tokenizer_path` is then their name, or `name:path`.

Documents are data: the text of a special token inside a document is encoded as ordinary text, so
that no document can forge a boundary.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.registry import Registry, calling_module
from torchtitan.data.document_ends import Ends, NoToken, SpecialTokens, read_special_tokens
from torchtitan.data.list_tokenizer import ListTokenizer
from torchtitan.data.sentencepiece_model import SentencePieceTokenizer
from torchtitan.data.tiktoken_model import TiktokenTokenizer

KEY = "model.tokenizer_path"
_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
"""Looked for in a folder, in this order. The last is where Meta's repositories have it."""
_MOST_BYTES = 256 * 2**20
"""No tokenizer is larger; the weights of a model are."""
_DOWNLOAD = (
    "download one, for example with `torchtitan download --repo_id meta-llama/Llama-3.1-8B"
    ' --local_dir DIR`, or use "bytes", which needs no file'
)
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
_PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>")


class Tokenizer(Protocol):
    """What the data and the tools need of a tokenizer. Picklable, for reading processes.

    Two members are optional: `ends` (an `Ends`) says which of its two tokens a document is put
    between, both without it; `token_name(id)` is the text of a special token, for messages.
    """

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int | None: ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could give other ids."""
        ...

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `text`, with the start and end token if asked for (and if there is one)."""
        ...

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        """`encode` as int32 `[num_tokens]`, without a Python object a token where possible."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens have none."""
        ...


TokenizerFactory = Callable[[str], Tokenizer]
"""Builds the tokenizer of what follows `name:` in `model.tokenizer_path`, or of an empty text.
Raises ConfigError for what the user can mend."""


def _factory(name: str, thing: Any) -> TokenizerFactory:
    if not callable(thing):
        raise TypeError(f"the tokenizer {name} is not a function of a path")
    return thing  # type: ignore[no-any-return]


TOKENIZERS: Registry[TokenizerFactory] = Registry(KEY, "torchtitan.tokenizers", _factory)


def register_tokenizer(name: str, factory: TokenizerFactory) -> None:
    """Make `model.tokenizer_path = name` (or `name:path`) known. Raises ValueError for a taken
    name, or one that could be a path."""
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot be told from a path")
    TOKENIZERS.register(name, factory, calling_module())


def build_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at `path`: `bytes` or another registered one, a file, or a folder with one.

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
    return _read(file, path, special)


def _read(file: Path, path: str, special: SpecialTokens) -> Tokenizer:
    """The tokenizer in `file`, by its content; `path` is what the user set, for messages."""
    try:
        size = file.stat().st_size
        content = file.read_bytes() if size <= _MOST_BYTES else b""
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror}"
        raise ConfigError(ConfigIssue(KEY, problem, "make it readable", value=path)) from None
    if file.suffix == ".json" or content.lstrip().startswith(b"{"):
        return JsonTokenizer.from_file(file, path, special)
    for kind in (TiktokenTokenizer, SentencePieceTokenizer):
        if not kind.recognises(content):
            continue
        try:
            return kind(content, special)
        except NoToken as error:
            raise ConfigError(_no_token(error, file, path)) from None
        except ValueError as error:
            problem = f"{file} is not a readable tokenizer: {error}"
        fix = "download the file again, or use another one"
        raise ConfigError(ConfigIssue(KEY, problem, fix, value=path))
    problem = f"{file} is no tokenizer: it is {_in_words(content, size)}"
    raise ConfigError(ConfigIssue(KEY, problem, _DOWNLOAD, value=path))


def _no_token(error: NoToken, file: Path, path: str) -> ConfigIssue:
    fix = f'correct "{error.key}" in tokenizer_config.json, or special_tokens_map.json, beside it'
    problem = f"{file} has no {error.which}-of-text token ({error})"
    return ConfigIssue(KEY, problem, fix, value=path)


def _in_words(content: bytes, size: int) -> str:
    """What a file is that has been taken for a tokenizer."""
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


class ByteTokenizer:
    """256 bytes and 8 special tokens: start, end, padding, and five that are reserved."""

    vocab_size = 264
    bos_id = 256
    eos_id = 257
    pad_id = 258
    fingerprint = "bytes-1"
    ends = Ends()

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        content = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
        ids = np.empty(len(content) + bos + eos, dtype=np.int32)
        ids[int(bos) : int(bos) + len(content)] = content
        if bos:
            ids[0] = self.bos_id
        if eos:
            ids[-1] = self.eos_id
        return ids

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_name(self, token: int) -> str:
        """The text of a special token."""
        return {self.bos_id: "<start>", self.eos_id: "<end>"}.get(token, f"<{token}>")


TOKENIZERS.add_built_in("bytes", lambda path: ByteTokenizer())


class JsonTokenizer(ListTokenizer):
    """A `tokenizer.json`, with the special tokens that the files beside it name.

    Without such files the usual names of Llama 2, Llama 3 and GPT-2 are looked up. Truncation and
    padding stored in the file are switched off: they would silently shorten documents.
    """

    def __init__(self, content: str, special: SpecialTokens):
        self._content = content
        self.special = special
        self._tokenizer = _load(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_id: int | None = _id(vocabulary, special.bos, _BOS_NAMES)
        eos_id = _id(vocabulary, special.eos, _EOS_NAMES)
        self.pad_id: int | None = _id(vocabulary, special.pad, _PAD_NAMES)
        if eos_id is None:
            raise NoToken("end", special.eos)
        if self.bos_id is None and special.bos is not None and special.add_bos is not False:
            raise NoToken("start", special.bos)
        self.eos_id = eos_id
        self.ends = special.ends(self.bos_id, _template(content, self._tokenizer))
        ids = json.dumps([self.bos_id, self.eos_id, self.pad_id])
        self.fingerprint = "json-" + hashlib.sha256((content + ids).encode()).hexdigest()

    @classmethod
    def from_file(cls, file: Path, path: str, special: SpecialTokens) -> "JsonTokenizer":
        """Read `file`; `path` is what the user set, for messages. Raises ConfigError."""
        try:
            return cls(file.read_text(encoding="utf-8"), special)
        except NoToken as error:
            problem = _no_token(error, file, path)
        except Exception as error:  # the library raises bare Exception for a broken file
            problem = ConfigIssue(
                KEY,
                f"{file} is not a readable tokenizer: {error}",
                "download the file again",
                value=path,
            )
        raise ConfigError(problem)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def token_name(self, token: int) -> str:
        """The text of a token."""
        return str(self._tokenizer.id_to_token(token))

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets that special tokens in documents are plain text.
        return JsonTokenizer, (self._content, self.special)


def _load(content: str) -> Any:
    from tokenizers import Tokenizer as Library

    tokenizer = Library.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _id(vocabulary: dict[str, int], name: str | None, usual: tuple[str, ...]) -> int | None:
    for candidate in (name,) if name is not None else usual:
        if candidate in vocabulary:
            return vocabulary[candidate]
    return None


def _template(content: str, tokenizer: Any) -> list[int] | None:
    """The ids that the post-processor puts around an empty text, or None: it has no rule for it."""
    post_processor = json.loads(content).get("post_processor") or {}
    parts = [post_processor, *post_processor.get("processors", ())]
    # ByteLevel, which is often there alone, is about offsets only.
    if not any(str(part.get("type")).endswith(("Template", "Processing")) for part in parts):
        return None
    ids: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    return ids
