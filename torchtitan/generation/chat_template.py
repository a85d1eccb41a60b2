"""Chat templates: a conversation as the text, and the token ids, that a model was trained on.

A template is a Jinja program that comes with a tokenizer, from whoever made it, so it runs in
Jinja's sandbox and sees nothing but the messages. It is found where Hugging Face keeps it:
`chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.

What people write is data. A template writes special tokens as text, so the text of a special token
inside a message is marked before the template runs, and stays ordinary text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

from torchtitan.config.errors import ConfigError, ConfigIssue

TEMPLATE_NAME = "chat_template.jinja"
_CONFIG_NAME = "tokenizer_config.json"
_MARK = "\ue0f7"
"""A character for private use, which no vocabulary has a token for."""
_KEY = "the chat template"
_FIX = "use a model that was tuned for chat, or plain prompts without a template"

Message: TypeAlias = Mapping[str, Any]
"""`role` ("system", "user", "assistant") and `content`."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer that templates need, with `special_ids` if it has special tokens."""

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`, in which nothing is a special token."""
        ...


class ChatTemplate:
    """A template and the tokens that it may name. Raises ConfigError if Jinja cannot read it."""

    def __init__(self, source: str, variables: Mapping[str, str], origin: str):
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._origin = origin
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_generation_extension(), "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise self._error(f"is not a Jinja template: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, up to where the assistant answers if asked.

        Raises ConfigError where the template fails, or rejects the conversation.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except RecursionError:
            raise self._error("recurses without end") from None
        except Exception as error:  # the program may do anything
            raise self._error(f"does not render: {error}") from error

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: ChatTokenizer,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of `render`; special tokens are those of the template only."""
        special = _special_pattern(tokenizer)
        marked = messages
        if special is not None:
            marked = [_marked(message, special) for message in messages]
        return encode_rendered(self.render(marked, add_generation_prompt), tokenizer)

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
        return ConfigError(ConfigIssue(_KEY, problem, f"correct {self._origin}", self._origin))


def encode_rendered(text: str, tokenizer: ChatTokenizer) -> list[int]:
    """Return the ids of a text in which the texts of special tokens are these tokens."""
    special, special_ids = _special_pattern(tokenizer), _special_ids(tokenizer)
    ids = list[int]()
    for part in [text] if special is None else special.split(text):
        if part in special_ids:
            ids.append(special_ids[part])
        elif part:
            ids += tokenizer.encode(part.replace(_MARK, ""), bos=False, eos=False)
    return ids


def read_chat_template(folders: Sequence[Path]) -> ChatTemplate:
    """Return the template of the first of `folders` that has one. Raises ConfigError."""
    for folder in folders:
        config = _read_config(folder / _CONFIG_NAME)
        source, origin = config.get("chat_template"), folder / _CONFIG_NAME
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
    problem = f"is missing: neither {TEMPLATE_NAME} nor a chat_template in {_CONFIG_NAME} ({where})"
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
    names = sorted(filter(None, _special_ids(tokenizer)), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None


def _marked(message: Message, special: re.Pattern[str]) -> Message:
    """Return the message with a mark inside every text of a special token."""

    def mark(found: re.Match[str]) -> str:
        return found.group()[0] + _MARK + found.group()[1:]

    return {
        key: special.sub(mark, value) if isinstance(value, str) and key != "role" else value
        for key, value in message.items()
    }


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
            return nodes.Scope(body, lineno=line)

    return Generation
