"""Tokenizers of bytes, of `tokenizer.json` and of sentencepiece. See `tokenizers.py`."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.data.document_ends import UNNAMED, Ends, NoToken, SpecialTokens

_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
_PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>")
_FIRST_FIELD = b"\n"
"""Tag of the list of pieces, with which the model's protocol buffer begins."""


def without_surrogates(text: str) -> str:
    """Return `text` with each lone surrogate as `?`.

    JSON escapes can leave half a character in a text. UTF-8 has no bytes for it, and libraries
    reject it.
    """
    if text.isascii():
        return text
    return text.encode("utf-8", errors="replace").decode("utf-8")


class ByteTokenizer:
    """256 bytes and 8 special tokens: start, end, padding, and five that are reserved."""

    vocab_size = 264
    bos_id = 256
    eos_id = 257
    pad_id = 258
    fingerprint = "bytes-1"
    ends = Ends()
    special_ids: Mapping[str, int] = {"<start>": 256, "<end>": 257}

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`."""
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        """Return the ids of `text`: int32 `[num_tokens]`."""
        content = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
        ids = np.empty(len(content) + bos + eos, dtype=np.int32)
        ids[int(bos) : int(bos) + len(content)] = content
        if bos:
            ids[0] = self.bos_id
        if eos:
            ids[-1] = self.eos_id
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_name(self, token: int) -> str:
        """Return the text of a special token."""
        return {self.bos_id: "<start>", self.eos_id: "<end>"}.get(token, f"<{token}>")


class FileTokenizer:
    """A tokenizer that is made of the content of a file and the special tokens named next to it."""

    bos_id: int | None
    eos_id: int
    _content: Any
    special: SpecialTokens
    folder: Path | None = None
    """Folder of its files; not known in worker processes."""

    def _set_special(
        self, fingerprint: str, bos: int | None, eos: int, id_of: Callable[[str], int | None]
    ) -> None:
        """Set the start and end token: `bos` and `eos` are the file's own. Raises NoToken."""
        self.bos_id, self.eos_id = self.special.find(bos, eos, id_of)
        self.ends = self.special.ends(self.bos_id)
        self.fingerprint = fingerprint + hashlib.sha256(self._content).hexdigest()
        if (self.bos_id, self.eos_id) != (bos, eos):
            self.fingerprint += f"-{self.bos_id}-{self.eos_id}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The libraries' own pickles are missing, or forget settings.
        return type(self), (self._content, self.special)


class ListTokenizer(FileTokenizer):
    """A tokenizer whose library gives the ids of a text as a list."""

    def _ids(self, text: str) -> list[int]:
        """Return a new list of the ids of `text`, which UTF-8 can express."""
        raise NotImplementedError

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`."""
        ids = self._ids(without_surrogates(text))
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        """Return the ids of `text`: int32 `[num_tokens]`."""
        return np.array(self.encode(text, bos, eos), dtype=np.int32)


class JsonTokenizer(ListTokenizer):
    """A `tokenizer.json`, with the special tokens that the files next to it name.

    Without such files the usual names of Llama 2, Llama 3 and GPT-2 are looked up. Truncation and
    padding stored in the file are switched off: they would silently shorten documents.
    """

    def __init__(self, content: str, special: SpecialTokens):
        self._content = content
        self.special = special
        self._tokenizer = _load(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_id: int | None = _first(vocabulary, special.bos, _BOS_NAMES)
        eos_id = _first(vocabulary, special.eos, _EOS_NAMES)
        self.pad_id: int | None = _first(vocabulary, special.pad, _PAD_NAMES)
        if eos_id is None:
            raise NoToken("end", special.eos)
        if self.bos_id is None and special.bos is not None and special.add_bos is not False:
            raise NoToken("start", special.bos)
        self.eos_id = eos_id
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.ends = special.ends(self.bos_id, _template(content, self._tokenizer))
        ids = json.dumps([self.bos_id, self.eos_id, self.pad_id])
        self.fingerprint = "json-" + hashlib.sha256((content + ids).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def token_name(self, token: int) -> str:
        """Return the text of a token."""
        return str(self._tokenizer.id_to_token(token))


def _load(content: str) -> Any:
    from tokenizers import Tokenizer as Library

    tokenizer = Library.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first(vocabulary: dict[str, int], name: str | None, usual: tuple[str, ...]) -> int | None:
    for candidate in (name,) if name is not None else usual:
        if candidate in vocabulary:
            return vocabulary[candidate]
    return None


def _template(content: str, tokenizer: Any) -> list[int] | None:
    """Return the ids that the post-processor puts around an empty text; None without a rule."""
    post_processor = json.loads(content).get("post_processor") or {}
    parts = [post_processor, *post_processor.get("processors", ())]
    # ByteLevel, which is often there alone, is about offsets only.
    if not any(str(part.get("type")).endswith(("Template", "Processing")) for part in parts):
        return None
    ids: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    return ids


class SentencePieceTokenizer(ListTokenizer):
    """A `tokenizer.model` of sentencepiece, as Llama 2 has it.

    Everything is in the file: pieces, normalisation, and the ids of start, end and padding. Its
    control symbols (`<s>`, `</s>`) are never found in text, so a document cannot forge one. Raises
    ValueError where `content`, that of the file, is damaged.
    """

    def __init__(self, content: bytes, special: SpecialTokens = UNNAMED):
        from sentencepiece import SentencePieceProcessor

        self._content, self.special = content, special
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError("sentencepiece cannot read it") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id = _id(self._processor.pad_id())
        eos_id = _id(self._processor.eos_id())
        if eos_id is None:
            raise ValueError("it was trained without an end-of-text token")
        self.special_ids = {
            self._processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._processor.is_control(i)
        }
        bos_id = _id(self._processor.bos_id())
        self._set_special("sentencepiece-1-", bos_id, eos_id, self._id_of)

    @staticmethod
    def recognises(content: bytes) -> bool:
        """Tell whether the file is one of sentencepiece's, even if damaged further on."""
        return content.startswith(_FIRST_FIELD)

    def _id_of(self, name: str) -> int | None:
        found = self._processor.piece_to_id(name)
        return found if self._processor.id_to_piece(found) == name else None  # unknown: <unk>

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        # A model's vocabulary may be larger than the tokenizer's.
        ends = (self.bos_id, self.eos_id)  # which may be no control symbols, but words
        kept = [i for i in ids if 0 <= i < self.vocab_size and i not in ends]
        text: str = self._processor.decode(kept)
        return text

    def token_name(self, token: int) -> str:
        """Return the text of a token."""
        return str(self._processor.id_to_piece(token))


def _id(number: int) -> int | None:
    """Return None for -1, which means that a model has no such token."""
    return None if number < 0 else number
