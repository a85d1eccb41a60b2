"""Rows of chat data as conversations: OpenAI's, ShareGPT's and Alpaca's columns, and pairs.

`chat` reads a column of messages, `instruct` a question and an answer in columns of their own, and
`preference` two answers to one prompt. The columns and roles below are known; `data.columns` and
`data.roles` say what they are called elsewhere. A row that does not fit raises BadRow. No torch.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchtitan.config.schema import Data
from torchtitan.data.sources import BadRow, kind_of

MESSAGE_COLUMNS = ("messages", "conversations")
INSTRUCT_COLUMNS = ("instruction", "input", "output", "prompt", "completion", "system")
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected", "system")
MESSAGE_KEYS = {"role": ("role", "from"), "content": ("content", "value")}
"""Key of a message -> its names."""
COLUMNS = {
    "chat": (*MESSAGE_COLUMNS, "tools"),
    "instruct": (*INSTRUCT_COLUMNS, "tools"),
    "preference": (*PREFERENCE_COLUMNS, "tools"),
}
"""Format -> the columns that it reads."""
_QUESTION, _ANSWER = ("instruction", "prompt"), ("output", "completion")
_REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (MESSAGE_COLUMNS,),
    "instruct": (_QUESTION, _ANSWER),
    "preference": (("chosen",), ("rejected",)),
}
"""Format -> columns of which a row must have one each."""
ROLES = ("system", "developer", "user", "assistant", "tool")
KNOWN_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Role in the data -> role for templates."""
FLAGS = ("weight", "train")
"""Keys of a message that say whether it is trained."""


class Conversation(NamedTuple):
    """Messages for a template, and which of them a flag trains or does not."""

    messages: list[dict[str, Any]]
    flags: list[bool | None]
    """One for each message; None where `data.train_on` decides."""
    tools: list[Any] | None = None


class ChatFormat:
    """The reader of rows of one format. Picklable."""

    def __init__(self, name: str, columns: Mapping[str, str], roles: Mapping[str, str]):
        self.name = name
        self._names = dict(columns)
        self._roles = {**KNOWN_ROLES, **roles}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read of the data, those that exist."""
        return tuple(self._names.get(column, column) for column in COLUMNS[self.name])

    def missing(self, names: Sequence[str]) -> str:
        """Return what columns of these names lack; empty if they will do."""
        try:
            for columns in _REQUIRED[self.name]:
                self._first(dict.fromkeys(names, True), columns)
        except BadRow as error:
            return str(error)
        return ""

    @property
    def description(self) -> dict[str, Any]:
        """Names of columns and roles, as JSON values."""
        renamed = {k: v for k, v in self._roles.items() if KNOWN_ROLES.get(k) != v}
        return {"columns": self._names, "roles": renamed}

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation of a row of `chat` or `instruct`. Raises BadRow."""
        tools = self._tools(row)
        if self.name == "chat":
            column = self._first(row, MESSAGE_COLUMNS)
            messages, flags = self._messages(row[column], f"column {column!r}")
        else:
            messages, flags = self._instruct(row)
        return Conversation(messages, flags, tools)

    def pair(self, row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
        """Return the chosen and the rejected conversation; only answers are trained.

        Raises BadRow.
        """
        prompt, tools = self._value(row, "prompt"), self._tools(row)
        sides, flags = list[list[dict[str, Any]]](), list[list[bool | None]]()
        for column in ("chosen", "rejected"):
            name = self._first(row, (column,))
            answer = row[name]
            if isinstance(answer, str) and prompt is None:
                named = self._names.get("prompt", "prompt")
                raise BadRow(f"column {name!r} is text, and there is no column {named!r}", named)
            messages, own = self._messages(answer, f"column {name!r}", "assistant")
            if messages[0]["role"] == "assistant" and prompt is not None:
                messages = self._messages(prompt, "the prompt", "user")[0] + messages
                messages = self._system(row) + messages
            sides.append(messages)
            of_prompt: list[bool | None] = [None] * (len(messages) - len(own))
            flags.append(of_prompt + own)
        common = 0
        while common < min(map(len, sides)) and sides[0][common] == sides[1][common]:
            common += 1
        if sides[0] == sides[1]:
            raise BadRow("chosen and rejected are equal, so there is nothing to prefer")
        if any(common == len(side) for side in sides):
            raise BadRow("one of chosen and rejected is the beginning of the other")
        shared: list[bool | None] = [False] * common
        first, second = (
            Conversation(side, shared + own[common:], tools) for side, own in zip(sides, flags)
        )
        return first, second

    def _instruct(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[bool | None]]:
        question = self._first(row, _QUESTION)
        answer = self._first(row, _ANSWER)
        messages, _ = self._messages(row[question], f"column {question!r}", "user")
        more = self._value(row, "input")
        if more is not None and not isinstance(more, str):
            raise BadRow(f"column {self._names.get('input', 'input')!r} holds {kind_of(more)}")
        if more and more.strip():
            messages[-1]["content"] += f"\n\n{more}"
        messages = self._system(row) + messages
        answers, flags = self._messages(row[answer], f"column {answer!r}", "assistant")
        # The assistant's turns in a prompt are not what is to be learned.
        of_prompt = [False if m["role"] == "assistant" else None for m in messages]
        return messages + answers, of_prompt + flags

    def _system(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        system = self._value(row, "system")
        return self._messages(system, "the system message", "system")[0] if system else []

    def _messages(
        self, items: Any, what: str, role: str = ""
    ) -> tuple[list[dict[str, Any]], list[bool | None]]:
        """Return messages and flags; a text becomes one message of `role`. Raises BadRow."""
        if isinstance(items, str) and role:
            items = [{"role": role, "content": items}]
        elif isinstance(items, str) and items.lstrip().startswith("["):
            items = _parsed(items, what)
        if not isinstance(items, Sequence) or isinstance(items, str | bytes):
            raise BadRow(f"{what} holds {kind_of(items)} where a list of messages is expected")
        if not items:
            raise BadRow(f"{what} holds no message")
        found = [self._message(item, f"message {n} of {what}") for n, item in enumerate(items, 1)]
        return [message for message, _ in found], [flag for _, flag in found]

    def _message(self, item: Any, where: str) -> tuple[dict[str, Any], bool | None]:
        if not isinstance(item, Mapping):
            raise BadRow(f"{where} is {kind_of(item)} where an object is expected")
        message = {key: _without_none(value) for key, value in item.items() if value is not None}
        given = {key: self._take(message, key) for key in MESSAGE_KEYS}
        role, content = given["role"], given["content"]
        if not isinstance(role, str) or role not in self._roles:
            problem = "has no role" if role is None else f"has the unknown role {role!r}"
            raise BadRow(
                f"{where} {problem}; known are {', '.join(ROLES)}, and data.roles maps others"
            )
        role = self._roles[role]
        flag = _flag(message, where)
        content = _text(content, where)
        calls = message.get("tool_calls")
        if content is None and not calls:
            raise BadRow(f"{where} ({role}) has no content")
        if role == "assistant" and not calls and not str(content).strip():
            raise BadRow(f"{where} is an empty answer of the assistant")
        if calls:
            message["tool_calls"] = _with_objects(calls, where)
        return {"role": role, "content": content or "", **message}, flag

    def _take(self, message: dict[str, Any], key: str) -> Any:
        """Remove the key of a message, under all of its names, and return the first one's value."""
        names = (self._names.get(key, key), *MESSAGE_KEYS[key])
        found = [message.pop(name) for name in names if name in message]
        return found[0] if found else None

    def _tools(self, row: Mapping[str, Any]) -> list[Any] | None:
        tools = self._value(row, "tools")
        if isinstance(tools, str):
            tools = _parsed(tools, "column 'tools'") if tools.strip() else None
        if tools is not None and not isinstance(tools, list):
            raise BadRow(f"column 'tools' holds {kind_of(tools)} where a list is expected")
        return _without_none(tools) or None

    def _value(self, row: Mapping[str, Any], column: str) -> Any:
        return row.get(self._names.get(column, column))

    def _first(self, row: Mapping[str, Any], columns: Sequence[str]) -> str:
        """Return the name of the first of the columns that the row has. Raises BadRow."""
        names = [self._names.get(column, column) for column in columns]
        for name in names:
            if row.get(name) is not None:
                return name
        there = ", ".join(repr(name) for name in row) or "none"
        looked_for = " or ".join(map(repr, names))
        raise BadRow(
            f"there is no column {looked_for}, of format {self.name!r}; the columns are {there}"
            f"{_hint(self.name, row)}",
            names[0],
        )


def chat_format(data: Data) -> ChatFormat | None:
    """Return the reader of the rows of a dataset; None for text."""
    return None if data.format == "text" else ChatFormat(data.format, data.columns, data.roles)


def _hint(name: str, row: Mapping[str, Any]) -> str:
    """Name the format that the columns are of, if it is another one."""
    found = {
        "preference": "chosen" in row and "rejected" in row,
        "chat": any(column in row for column in MESSAGE_COLUMNS),
        "instruct": any(column in row for column in ("instruction", "completion", "output")),
    }
    for other, fits in found.items():
        if fits and other != name:
            return f', which look like format = "{other}"'
    return "; data.columns maps other names"


def _flag(message: dict[str, Any], where: str) -> bool | None:
    """Remove `train` and `weight` of a message, and return what they say."""
    flags = [(key, message.pop(key)) for key in FLAGS if key in message]
    for key, value in flags:
        if value not in (0, 1):  # True and False among them
            raise BadRow(f"{where} has {key} {value!r}; only 0 and 1, or true and false, are known")
    return bool(flags[-1][1]) if flags else None


def _text(content: Any, where: str) -> str | None:
    """Return the text of a message, which may be in parts. Raises BadRow."""
    if content is None or isinstance(content, str):
        text = content
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
                raise BadRow(f"{where} has a part of type {kind!r}; only text can be trained on")
            texts.append(str(part.get("text", "")))
        text = "".join(texts)
    else:
        raise BadRow(f"{where} has {kind_of(content)} as content where text is expected")
    if text is not None and not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"{where} holds half a UTF-16 pair") from None
    return text


def _with_objects(calls: Any, where: str) -> list[Any]:
    """Return tool calls with their arguments as objects, as templates expect them."""
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise BadRow(f"{where} has {kind_of(calls)} as tool_calls where a list is expected")
    found = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise BadRow(f"{where} has {kind_of(call)} as a tool call where an object is expected")
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = _parsed(function["arguments"], f"the arguments of a tool call of {where}")
            call = {**call, "function": {**function, "arguments": arguments}}
        found.append(dict(call))
    return found


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} holds invalid JSON: {error}") from None


def _without_none(value: Any) -> Any:
    """Return the value without the nulls with which Parquet and Arrow fill up objects."""
    if isinstance(value, Mapping):
        return {k: _without_none(inner) for k, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value
