"""Texts and conversations to continue: checked, and as token ids. No torch until they are ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.data.document_ends import Ends

if TYPE_CHECKING:
    from torchtitan.data.chat_template import ChatTemplate
    from torchtitan.generation.generate import Prompt
    from torchtitan.training.pretrained import Pretrained

_MOST_PROBLEMS = 10


@dataclass(frozen=True)
class Request:
    """A text or conversation to continue, with a `prompt` or `messages`; `where` it stands."""

    where: str
    fields: dict[str, Any]


def check_requests(requests: Sequence[Request]) -> None:
    """Raise ConfigError for requests that are no text or conversation. Needs no torch."""
    problems = [problem for request in requests for problem in _problems(request)]
    if problems:
        raise ConfigError(problems[:_MOST_PROBLEMS])


def _problems(request: Request) -> Iterator[ConfigIssue]:
    from torchtitan.data.chat_template import check_messages

    fields, fix = request.fields, 'give it a "prompt" (a text) or "messages"'
    if not isinstance(fields, dict):
        yield ConfigIssue(request.where, "is not an object", fix)
    elif ("prompt" in fields) == ("messages" in fields):
        yield ConfigIssue(request.where, "has not exactly one of prompt and messages", fix)
    elif "prompt" in fields and not isinstance(fields["prompt"], str):
        yield ConfigIssue(request.where, "its prompt is no text", fix)
    elif "prompt" in fields and not fields["prompt"]:
        yield ConfigIssue(request.where, "is empty", "write something to continue")
    elif "messages" in fields:
        try:
            check_messages(fields["messages"])
        except ValueError as error:
            yield ConfigIssue(request.where, str(error), fix)


def template_of(found: Pretrained, requests: Sequence[Request]) -> ChatTemplate | None:
    """Return the model's chat template if a request needs one. Raises ConfigError."""
    from torchtitan.data.chat_template import read_chat_template

    if any("messages" in request.fields for request in requests):
        return read_chat_template(found.folders)
    return None


def encode(
    found: Pretrained, requests: Sequence[Request], template: ChatTemplate | None
) -> list[Prompt]:
    """Return the token ids of all requests. Raises ConfigError for those the model cannot take."""
    from torchtitan.generation.generate import Prompt

    prompts, problems, longest = [], [], found.args.max_seq_len
    for number, request in enumerate(requests):
        if template is not None and "messages" in request.fields:
            ids = template.encode(request.fields["messages"], found.tokenizer)
        else:
            ids = _encode_text(found, request.fields["prompt"])
        if not ids:
            problems.append(ConfigIssue(request.where, "is empty: it has no tokens", "write more"))
        elif len(ids) >= longest:
            text = f"has {len(ids)} tokens, but the model's longest sequence is {longest}"
            problems.append(ConfigIssue(request.where, text, "shorten it"))
        prompts.append(Prompt(number, ids))
    if problems:
        raise ConfigError(problems[:_MOST_PROBLEMS])
    return prompts


def _encode_text(found: Pretrained, text: str) -> list[int]:
    """Return the ids of a text, with the start token where the tokenizer says so."""
    ends = getattr(found.tokenizer, "ends", Ends())
    return found.tokenizer.encode(text, bos=ends.bos, eos=False)
