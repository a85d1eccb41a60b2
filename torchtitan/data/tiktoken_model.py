"""A `tokenizer.model` of tiktoken: lines of a token in base64 and its rank, as Llama 3 has it.

The file holds nothing but the ranks. How text is split before pairs of bytes are merged, and which
special tokens follow the ranks, is Llama 3's: 256 of them, with the names of Llama 3.1, which only
gave names to some that Llama 3 had reserved.

tiktoken merges within a piece of text that its pattern finds. The time for a piece grows faster
than its length, and on a million blanks the pattern overflows the stack. So long runs are cut
before, where Meta's own code cuts them, which keeps the ids the same as there.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from torchtitan.data.document_ends import UNNAMED, SpecialTokens
from torchtitan.data.tokenizer_formats import FileTokenizer, without_surrogates

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n?")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "reserved_special_token_2",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
)
_NUM_SPECIAL = 256
_MOST_CHARACTERS = 400_000
"""Longer texts are encoded in parts of this length."""
_LONGEST_RUN = 25_000
"""Characters without a blank among them, or of blanks only; longer runs are cut."""
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_RUN + 1},}}|(?<!\s)\s{{{_LONGEST_RUN + 1},}}")


def special_tokens() -> list[str]:
    """Return Llama 3's special tokens in the order of their ids, which follow the ranks."""
    rest = range(3, _NUM_SPECIAL - len(_NAMED) + 3)
    return [f"<|{name}|>" for name in (*_NAMED, *(f"reserved_special_token_{n}" for n in rest))]


class TiktokenTokenizer(FileTokenizer):
    """See the module. Raises ValueError where `content`, that of the file, is damaged."""

    def __init__(self, content: bytes, special: SpecialTokens = UNNAMED):
        import tiktoken

        self._content, self.special = content, special
        ranks = _parse(content)
        self._num_ranks = len(ranks)
        ids = {name: len(ranks) + n for n, name in enumerate(special_tokens())}
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ids
        )
        self.vocab_size = len(ranks) + len(ids)
        self.special_ids = ids
        self.pad_id: int | None = ids["<|finetune_right_pad_id|>"]
        own = ids["<|begin_of_text|>"], ids["<|end_of_text|>"]
        self._set_special("tiktoken-1-", *own, ids.get)

    @staticmethod
    def recognises(content: bytes) -> bool:
        """Tell whether the file is one of tiktoken's, even if damaged further on."""
        return _LINE.match(content) is not None

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`."""
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        """Return the ids of `text`: int32 `[num_tokens]`."""
        ids = [[self.bos_id]] * bos
        ids += [self._encode_part(part) for part in parts_of(without_surrogates(text))]
        ids += [[self.eos_id]] * eos
        return np.concatenate([np.empty(0, np.int32), *ids]).astype(np.int32)

    def _encode_part(self, text: str) -> Any:
        # No special token is allowed, so that all text is ordinary, and none is refused either.
        return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return self._encoding.decode([i for i in ids if 0 <= i < self._num_ranks])

    def token_name(self, token: int) -> str:
        """Return the text of a special token."""
        return special_tokens()[token - self._num_ranks]


def parts_of(text: str) -> Iterator[str]:
    """Yield `text` in parts that can be encoded quickly, split as in Meta's code."""
    for start in range(0, len(text), _MOST_CHARACTERS):
        part = text[start : start + _MOST_CHARACTERS]
        cuts = [0]
        if len(part) > _LONGEST_RUN:
            for run in _LONG_RUN.finditer(part):
                cuts += range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN)
        yield from (part[i:j] for i, j in zip(cuts, [*cuts[1:], len(part)]))


def _parse(content: bytes) -> dict[bytes, int]:
    """Return the rank of every token: 0, 1, 2, ..., with one for every byte."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            decoded, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not a token in base64 and its rank") from None
        if decoded in ranks:
            raise ValueError(f"line {number} repeats a token")
        ranks[decoded] = value
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2 and so on, each once")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ValueError(f"there is no token for the byte 0x{byte:02x}")
    return ranks
