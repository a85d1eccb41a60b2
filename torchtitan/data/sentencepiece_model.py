"""A `tokenizer.model` of sentencepiece, as Llama 2 has it.

Everything is in the file: pieces, normalisation, and the ids of start, end and padding. Its control
symbols (`<s>`, `</s>`) are never found in text, so a document cannot forge one.
"""

import hashlib
from typing import Any

from torchtitan.data.document_ends import UNNAMED, SpecialTokens
from torchtitan.data.list_tokenizer import ListTokenizer

_FIRST_FIELD = b"\n"
"""Tag of the list of pieces, with which the model's protocol buffer begins."""


class SentencePieceTokenizer(ListTokenizer):
    """See the module. Raises ValueError where `content`, that of the file, is damaged."""

    def __init__(self, content: bytes, special: SpecialTokens = UNNAMED):
        from sentencepiece import SentencePieceProcessor

        self._content = content
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError("sentencepiece cannot read it") from None
        self.vocab_size: int = self._processor.vocab_size()
        bos_id = _id(self._processor.bos_id())
        self.pad_id = _id(self._processor.pad_id())
        eos_id = _id(self._processor.eos_id())
        if eos_id is None:
            raise ValueError("it was trained without an end-of-text token")
        self.bos_id, self.eos_id = special.find(bos_id, eos_id, self._id_of)
        self.special = special
        self.ends = special.ends(self.bos_id)
        self.fingerprint = "sentencepiece-1-" + hashlib.sha256(content).hexdigest()
        if (self.bos_id, self.eos_id) != (bos_id, eos_id):
            self.fingerprint += f"-{self.bos_id}-{self.eos_id}"

    @staticmethod
    def recognises(content: bytes) -> bool:
        """Whether a file with this content is one of sentencepiece's, be it damaged further on."""
        return content.startswith(_FIRST_FIELD)

    def _id_of(self, name: str) -> int | None:
        found = self._processor.piece_to_id(name)
        return found if self._processor.id_to_piece(found) == name else None  # unknown: <unk>

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        # A model's vocabulary may be larger than the tokenizer's.
        ends = (self.bos_id, self.eos_id)  # which may be no control symbols, but words
        kept = [i for i in ids if 0 <= i < self.vocab_size and i not in ends]
        text: str = self._processor.decode(kept)
        return text

    def token_name(self, token: int) -> str:
        """The text of a token."""
        return str(self._processor.id_to_piece(token))

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._content, self.special)


def _id(number: int) -> int | None:
    """sentencepiece gives -1 for what a model does not have."""
    return None if number < 0 else number
