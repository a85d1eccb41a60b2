"""A sequence as a reader sees it: its text, special tokens by name, what is trained on marked."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from torchtitan.data.tokenizers import Tokenizer
from torchtitan.models.batch import IGNORE_INDEX


def text_of(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of tokens with special ones by their name, safe to print."""
    special: dict[str, int] = getattr(tokenizer, "special_ids", {})
    names = {number: name for name, number in special.items()}
    parts = []
    for name, run in groupby(tokens, names.get):
        ids = list(run)
        parts.append(tokenizer.decode(ids) if name is None else name * len(ids))
    return "".join(parts).replace("\x1b", "\\x1b")


def sequence_text(tokens: Tensor, labels: Tensor, tokenizer: Tokenizer, marks: bool) -> str:
    """Return the text of a sequence without its padding; `marks`: what is trained on in ⟦⟧.

    `tokens` and `labels` `[T]`; the label of a place is the token to predict after it.
    """
    found: list[tuple[bool, int]] = []
    # The last token of a conversation is a label only: the next one begins in its place.
    expected = IGNORE_INDEX
    for token, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        if expected not in (IGNORE_INDEX, token):
            found.append((True, expected))
        found.append((expected == token, token))
        expected = label
    if expected != IGNORE_INDEX:
        found.append((True, expected))
    while found and not found[-1][0]:
        found.pop()
    if not marks:
        return text_of([token for _, token in found], tokenizer)
    return "".join(_marked(found, tokenizer))


def _marked(found: Iterable[tuple[bool, int]], tokenizer: Tokenizer) -> Iterator[str]:
    for is_trained, run in groupby(found, lambda pair: pair[0]):
        text = text_of([token for _, token in run], tokenizer)
        yield f"⟦{text}⟧" if is_trained else text
