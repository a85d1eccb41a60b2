"""Conversations as tokens, and which of these are trained.

A turn of the assistant is what rendering adds to the text of the messages before it, with the
prompt for an answer: at inference the model gets that text and writes the rest. So the mask is read
off incremental renderings, each of which must be the beginning of the whole. Templates with
`{% generation %}` blocks say it themselves. Where a template rewrites earlier turns (Qwen3 drops
their reasoning), each trained turn becomes a sample of its own, with the text before it as the
model would have got it. Where even that text differs from the beginning of the sample, the row
cannot be used: nothing is guessed.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchtitan.config import ConfigError
from torchtitan.config.schema import Data, OnLong, Training, TrainOn
from torchtitan.data.chat_formats import ChatFormat, Conversation, chat_format
from torchtitan.data.chat_template import (
    ChatTemplate,
    ChatTokenizer,
    Span,
    encode_spans,
    mark_special,
    trim_after_special,
)
from torchtitan.data.chat_templates import find_chat_template
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.ledger import DocumentSpan
from torchtitan.data.sources import BadRow
from torchtitan.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_VERSION = 1
"""Increased whenever the same rows would give other tokens."""


class Unit(NamedTuple):
    """One or more documents that stay together in a row: a conversation, or a pair."""

    tokens: np.ndarray
    """int32 `[num_tokens]`, the documents one after another."""
    trained: np.ndarray
    """bool `[num_tokens]`: the tokens that are targets."""
    lengths: tuple[int, ...]
    """Tokens of each document. The last one of each is not an input."""
    span: DocumentSpan | None = None
    """Its origin."""

    @property
    def size(self) -> int:
        """Positions that it takes in a row."""
        return len(self.tokens) - len(self.lengths)


class Encoded(NamedTuple):
    """The units of a row of the data, and what became of it."""

    units: Sequence[Unit]
    num_tokens: int
    """Tokens of the row before anything is cut off or left out."""
    truncated: bool = False
    """A part was cut off; or it was cut into several samples, with `split`."""
    dropped: bool = False
    """It was left out because it is too long."""
    untrained: bool = False
    """It was left out because none of its tokens is trained."""


class ChatEncoder:
    """Rows of chat data to tokens. Picklable, for worker processes."""

    def __init__(
        self,
        rows: ChatFormat,
        template: ChatTemplate,
        tokenizer: ChatTokenizer,
        train_on: TrainOn,
        on_long: OnLong,
        seq_len: int,
    ):
        self.rows = rows
        self.template = template
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._on_long = on_long
        self._seq_len = seq_len
        self._is_told = False

    def describe(self) -> str:
        """Describe in one line how conversations become tokens."""
        trained = {
            "assistant": "the assistant's turns",
            "last": "the last turn",
            "all": "all turns",
        }
        return f"conversations by {self.template.origin}; {trained[self._train_on]} trained"

    @property
    def description(self) -> dict[str, Any]:
        """Identifies what the same rows become (JSON)."""
        source = self.template.source.encode()
        return {
            "version": _VERSION,
            "format": self.rows.name,
            "names": self.rows.description,
            "template": hashlib.sha256(source).hexdigest()[:16],
            "train_on": self._train_on,
            "on_long": self._on_long,
        }

    def encode(self, row: Mapping[str, Any]) -> Encoded:
        """Return the samples of a row. Raises BadRow."""
        if self.rows.name == "preference":
            return self._pair(*self.rows.pair(row))
        documents = self.documents(self.rows.conversation(row))
        units, truncated, dropped = list[Unit](), False, False
        for tokens, trained in documents:
            is_long = len(tokens) > self._seq_len + 1
            dropped |= is_long and self._on_long == "drop"
            truncated |= is_long and self._on_long != "drop"
            for part in self._parts(len(tokens)):
                if trained[part][1:].any():
                    own = tokens[part]
                    units.append(Unit(own, trained[part], (len(own),)))
        total = sum(len(tokens) for tokens, _ in documents)
        return Encoded(units, total, truncated, dropped, untrained=not units and not dropped)

    def documents(
        self, of: Conversation, may_unroll: bool = True
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return tokens (int32) and which of them are trained (bool) of each sample.

        There is one, or one a trained turn where the template rewrites earlier ones and
        `may_unroll`. Raises BadRow.
        """
        of = of._replace(
            messages=mark_special(of.messages, self._tokenizer),
            tools=mark_special(of.tools, self._tokenizer),
        )
        wanted = self._wanted(of)
        text, generated = self._render(of)
        self._check_tools(of, text)
        if self._train_on == "all":
            left_out = [number for number, is_trained in enumerate(wanted) if not is_trained]
            spans = self._spans(of, text, generated, left_out)
            if spans is None:
                raise BadRow(self._unknown(min(left_out)))
            tokens, inside = self._encode(text, spans)
            return [(tokens, ~inside)]
        turns = [number for number, is_trained in enumerate(wanted) if is_trained]
        spans = self._spans(of, text, generated, turns)
        if spans is not None:
            return [self._encode(text, spans)]
        if not may_unroll:
            raise BadRow(self._unknown(turns[0]))
        if not self._is_told:
            self._is_told = True
            logger.info(
                "The chat template writes earlier turns in another way once others follow: each"
                " trained turn of such a conversation is a sample of its own"
            )
        return [self._one_turn(of, turn) for turn in turns]

    def _wanted(self, of: Conversation) -> list[bool]:
        """Return which messages are trained. Raises BadRow."""
        roles = [message["role"] for message in of.messages]
        if self._train_on != "all" and roles[-1] != "assistant":
            raise BadRow(f"the conversation ends with a message of the {roles[-1]}: no answer")
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        if self._train_on == "last":
            answers = answers[-1:]
        usual = [self._train_on == "all" or number in answers for number in range(len(roles))]
        return [use if flag is None else flag for use, flag in zip(usual, of.flags)]

    def _render(
        self, of: Conversation, end: int | None = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of the messages before `end`, with what the template marks in it."""
        try:
            return self.template.render_generated(of.messages[:end], prompt, of.tools)
        except ConfigError as error:
            messages = "no messages" if end == 0 else f"the first {end} messages"
            where = "" if end is None else f" (of {messages})"
            raise BadRow(f"the chat template {error.problems[0].problem}{where}") from None

    def _check_tools(self, of: Conversation, text: str) -> None:
        """Raise BadRow if the template ignores tools, or calls of them."""
        bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in of.messages]
        for what, other in (
            ("tools", of._replace(tools=None)),
            ("tool calls", of._replace(messages=bare)),
        ):
            if other == of or (of.tools is None and what == "tools"):
                continue
            try:
                is_ignored = self._render(other)[0] == text
            except BadRow:
                is_ignored = False
            if is_ignored:
                raise BadRow(f"the row has {what}, and the chat template does not write them")

    def _spans(
        self, of: Conversation, text: str, generated: list[Span], numbers: Sequence[int]
    ) -> list[Span] | None:
        """Return where the messages are in the text; None where that cannot be known."""
        answers = [n for n, message in enumerate(of.messages) if message["role"] == "assistant"]
        if generated and len(generated) == len(answers) and set(numbers) <= set(answers):
            return [generated[answers.index(number)] for number in numbers]
        spans = []
        for number in numbers:
            span = self._span(of, text, number)
            if span is None:
                return None
            spans.append(span)
        return spans

    def _span(self, of: Conversation, text: str, number: int) -> Span | None:
        is_answer = of.messages[number]["role"] == "assistant"
        before = "" if number == 0 and not is_answer else self._render(of, number, is_answer)[0]
        last = number == len(of.messages) - 1
        after = text if last else self._render(of, number + 1)[0]
        if not (text.startswith(after) and after.startswith(before)):
            return None
        return trim_after_special(text, (len(before), len(after)), self._tokenizer)

    def _one_turn(self, of: Conversation, turn: int) -> tuple[np.ndarray, np.ndarray]:
        of = of._replace(messages=of.messages[: turn + 1])
        text = self._render(of)[0]
        span = self._span(of, text, turn)
        if span is None:
            raise BadRow(self._unknown(turn))
        return self._encode(text, [span])

    def _encode(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        ids, inside = encode_spans(text, spans, self._tokenizer)
        return np.array(ids, dtype=np.int32), np.array(inside, dtype=bool)

    def _unknown(self, number: int) -> str:
        return (
            f"the chat template ({self.template.origin}) does not begin the whole conversation"
            f" with what it writes up to message {number + 1}, so where that begins and ends cannot"
            " be known"
        )

    def _parts(self, length: int) -> list[slice]:
        """Return the parts of a long sample, each of up to `seq_len + 1` tokens."""
        most = self._seq_len + 1
        if length <= most:
            return [slice(0, length)]
        if self._on_long == "split":  # overlapping by one, so that each token is a target once
            return [slice(k, k + most) for k in range(0, length - 1, self._seq_len)]
        return [] if self._on_long == "drop" else [self._cut(length, most)]

    def _cut(self, length: int, most: int) -> slice:
        is_left = self._on_long == "truncate_left"
        return slice(max(0, length - most), length) if is_left else slice(0, most)

    def _pair(self, *sides: Conversation) -> Encoded:
        """Return the unit of a pair, chosen first; both share a row."""
        found = []
        for name, side in zip(("chosen", "rejected"), sides):
            try:
                found += self.documents(side, may_unroll=False)
            except BadRow as error:
                raise BadRow(f"{name}: {error}") from None
        sizes = [len(tokens) - 1 for tokens, _ in found]
        total, is_long = sum(sizes) + 2, sum(sizes) > self._seq_len
        if is_long and self._on_long == "drop":
            return Encoded([], total, dropped=True)
        half = self._seq_len // 2
        kept = []
        for (tokens, trained), other in zip(found, reversed(sizes)):
            # Half of the row, and what the other one leaves of its half.
            part = self._cut(len(tokens), max(half, self._seq_len - other) + 1)
            if not trained[part][1:].any():
                return Encoded([], total, is_long, untrained=True)
            kept.append((tokens[part], trained[part]))
        if np.array_equal(kept[0][0], kept[1][0]):  # where they differ was cut off
            return Encoded([], total, is_long, untrained=True)
        tokens, trained = (np.concatenate(arrays) for arrays in zip(*kept))
        unit = Unit(tokens, trained, tuple(len(own) for own, _ in kept))
        return Encoded([unit], total, truncated=is_long)


def describe_rows(training: Training, data: Data, tokenizer: Tokenizer) -> str:
    """Describe in one line how rows become documents. Raises ConfigError."""
    encoder = chat_encoder(training, data, tokenizer)
    return document_tokenizer(tokenizer, data).describe() if encoder is None else encoder.describe()


def chat_encoder(training: Training, data: Data, tokenizer: Tokenizer) -> ChatEncoder | None:
    """Return the encoder of a dataset's rows; None for text. Raises ConfigError."""
    rows = chat_format(data)
    if rows is None:
        return None
    template = find_chat_template(data.chat_template, tokenizer)
    return ChatEncoder(rows, template, tokenizer, data.train_on, data.on_long, training.seq_len)
