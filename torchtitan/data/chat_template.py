"""Chat templates: a conversation as the text, and the token ids, that a model was trained on.

A template is a Jinja program that comes with a tokenizer, from whoever made it, so it runs in
Jinja's sandbox and sees nothing but the messages. It is found where Hugging Face keeps it:
`chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.

What people write is data. A template writes special tokens as text, so the text of a special token
inside a message is marked before the template runs, and stays ordinary text. (The marks are three
characters of Unicode's private use area; where a message holds these, they are lost.)

For training, `chat_encoder.py` cuts a rendered conversation into spans, and `encode_spans` says
which tokens lie in them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

from torchtitan.config.errors import ConfigError, ConfigIssue

TEMPLATE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"
_MARK, _OPEN, _CLOSE = "\ue0f7", "\ue0f8", "\ue0f9"
"""Characters for private use, which no vocabulary has a token for."""
_MARKS = re.compile(f"[{_MARK}{_OPEN}{_CLOSE}]")
_GENERATED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_KEY = "the chat template"
_FIX = "use a model that was tuned for chat, or plain prompts without a template"

Message: TypeAlias = Mapping[str, Any]
"""`role` ("system", "user", "assistant", "tool") and `content`, and `tool_calls` and the like."""
Span: TypeAlias = tuple[int, int]
"""The characters `[start, end)` of a rendered text."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer that templates need, with `special_ids` if it has special tokens."""

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`, in which nothing is a special token."""
        ...


class ChatTemplate:
    """A template and the tokens that it may name. Raises ConfigError if Jinja cannot read it.

    `today` is the date for templates that write one; None for the day on which they run. Picklable.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        origin: str,
        today: datetime | None = None,
    ):
        import jinja2

        from torchtitan.data.chat_sandbox import Sandbox

        self.source = source
        self.origin = origin
        self.variables = dict(variables)
        self._today = today
        self._environment = environment = Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_generation_extension(), "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise self._error(f"is not a Jinja template: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.variables, self.origin, self._today)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Return the text of a conversation, up to where the assistant answers if asked.

        Raises ConfigError where the template fails, or rejects the conversation.
        """
        return self.render_generated(messages, add_generation_prompt, tools)[0]

    def render_generated(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the text, and the spans that `{% generation %}` blocks mark in it.

        Raises ConfigError as `render`.
        """
        self._environment.steps = 0
        try:
            marked = self._template.render(
                messages=list(messages),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except RecursionError:
            raise self._error("recurses without end") from None
        except Exception as error:  # the program may do anything
            raise self._error(f"does not render: {error}") from error
        spans = [
            # before each block stand its own opening mark and both marks of every earlier one
            (found.start(1) - 2 * number - 1, found.end(1) - 2 * number - 1)
            for number, found in enumerate(_GENERATED.finditer(marked))
        ]
        return marked.replace(_OPEN, "").replace(_CLOSE, ""), spans

    def _strftime_now(self, form: str) -> str:
        return (self._today or datetime.now()).strftime(form)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: ChatTokenizer,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of `render`; special tokens are those of the template only."""
        return encode_rendered(
            self.render(mark_special(messages, tokenizer), add_generation_prompt), tokenizer
        )

    def end_of_turn(self, tokenizer: ChatTokenizer) -> int | None:
        """Return the special token that ends an assistant's turn; None if there is none."""
        answer = "x"
        conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        special = _special_pattern(tokenizer)
        if special is None:
            return None
        text = self.render(conversation, add_generation_prompt=False)
        found = special.search(text, text.rindex(answer))
        return None if found is None else _special_ids(tokenizer)[found.group()]

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(ConfigIssue(_KEY, problem, f"correct {self.origin}", self.origin))


def encode_rendered(text: str, tokenizer: ChatTokenizer) -> list[int]:
    """Return the ids of a text in which the texts of special tokens are these tokens."""
    return encode_spans(text, [], tokenizer)[0]


def encode_spans(
    text: str, spans: Sequence[Span], tokenizer: ChatTokenizer
) -> tuple[list[int], list[bool]]:
    """Return the ids of a rendered text, and for each of them if it lies in one of the spans.

    A token that would cross the border of a span is split there, as it is in generation, where
    the text up to the border is the prompt.
    """
    special, special_ids = _special_pattern(tokenizer), _special_ids(tokenizer)
    borders = sorted({border for span in spans for border in span})
    ids, inside = list[int](), list[bool]()
    place = 0
    for part in [text] if special is None else special.split(text):
        if part in special_ids:
            pieces = [(place, [special_ids[part]])]
        else:
            own = [border - place for border in borders if place < border < place + len(part)]
            pieces = _encode_cut(part, own, place, tokenizer) if part else []
        for start, piece in pieces:
            ids += piece
            inside += [any(first <= start < last for first, last in spans)] * len(piece)
        place += len(part)
    return ids, inside


def _encode_cut(
    text: str, cuts: Sequence[int], place: int, tokenizer: ChatTokenizer
) -> list[tuple[int, list[int]]]:
    """Return the ids of ordinary text between the cuts, each with its place (from `place` on)."""

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part.replace(_MARK, ""), bos=False, eos=False)

    ids = encode(text)
    pieces, start, done = list[tuple[int, list[int]]](), 0, 0
    for cut in cuts:
        head = encode(text[:cut])
        if ids[: len(head)] != head:  # a token crosses the cut
            own = head[done:] if head[:done] == ids[:done] else encode(text[start:cut])
            rest = [other - cut for other in cuts if other > cut]
            pieces.append((place + start, own))
            return pieces + _encode_cut(text[cut:], rest, place + cut, tokenizer)
        pieces.append((place + start, ids[done : len(head)]))
        start, done = cut, len(head)
    return [*pieces, (place + start, ids[done:])]


def trim_after_special(text: str, span: Span, tokenizer: ChatTokenizer) -> Span:
    """Return the span without blanks that follow its last special token.

    A turn ends with that token: generation stops there, and never writes what follows.
    """
    special = _special_pattern(tokenizer)
    found = [] if special is None else list(special.finditer(text, *span))
    if found and not text[found[-1].end() : span[1]].strip():
        return span[0], found[-1].end()
    return span


def read_chat_template(folders: Sequence[Path]) -> ChatTemplate:
    """Return the template of the first of `folders` that has one. Raises ConfigError."""
    for folder in folders:
        config = _read_config(folder / CONFIG_NAME)
        source, origin = config.get("chat_template"), folder / CONFIG_NAME
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if (folder / TEMPLATE_NAME).is_file():
            origin = folder / TEMPLATE_NAME
            source = _read_text(origin)
        if isinstance(source, str):
            return ChatTemplate(source, _tokens(config), str(origin))
        if source is not None:
            raise ConfigError(ConfigIssue(_KEY, "is no text", f"correct {origin}", str(origin)))
    where = ", ".join(str(folder) for folder in folders) or "the tokenizer has no folder"
    problem = f"is missing: neither {TEMPLATE_NAME} nor a chat_template in {CONFIG_NAME} ({where})"
    raise ConfigError(ConfigIssue(_KEY, problem, _FIX))


def check_messages(messages: Any) -> list[Message]:
    """Return `messages` if they are a conversation. Raises ValueError with what is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of objects with role and content")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"message {number} has no text as {key}")
    return messages


def _special_ids(tokenizer: ChatTokenizer) -> Mapping[str, int]:
    """Return the ids of special tokens by their text."""
    return getattr(tokenizer, "special_ids", {})


def _special_pattern(tokenizer: ChatTokenizer) -> re.Pattern[str] | None:
    return _pattern_of(frozenset(filter(None, _special_ids(tokenizer))))


@lru_cache(maxsize=8)
def _pattern_of(names: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if names else None


def mark_special(value: Any, tokenizer: ChatTokenizer) -> Any:
    """Return messages or tools with a mark inside every text of a special token."""
    return _marked(value, _special_pattern(tokenizer))


def _marked(value: Any, special: re.Pattern[str] | None, key: str = "") -> Any:
    if isinstance(value, str):
        value = _MARKS.sub("", value)
        if special is None or key == "role":
            return value
        return special.sub(lambda found: found.group()[0] + _MARK + found.group()[1:], value)
    if isinstance(value, Mapping):
        return {name: _marked(inner, special, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(inner, special) for inner in value]
    return value


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read_text(file))
    except ValueError as error:
        raise ConfigError(
            ConfigIssue(_KEY, f"cannot be looked up: {error}", "repair it", str(file))
        ) from None
    return content if isinstance(content, dict) else {}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            ConfigIssue(_KEY, f"cannot be read: {error}", "repair it", str(file))
        ) from None


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and others, which templates name."""
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[key] = token
    return found


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _generation_extension() -> Any:
    """Return the extension for `{% generation %}`, which marks what the assistant wrote."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (declared so by its base class)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_between_marks")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _between_marks(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    return Generation
