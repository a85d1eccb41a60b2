"""`torchtitan chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.utils.host import spin_briefly, tune_cpu_allocator

if TYPE_CHECKING:
    from torchtitan.commands.model_session import ModelSession
    from torchtitan.data.chat_template import ChatTemplate, Message
    from torchtitan.generation.generate import Limits
    from torchtitan.generation.sampling import SamplingParams
    from torchtitan.training.pretrained import Pretrained

_PATIENCE_SECONDS = 7 * 24 * 3600
"""Limit of waiting for rank 0, which waits for the user. torchrun ends all if one dies."""
_HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit ends"


def run(options: argparse.Namespace) -> int:
    """Talk until /exit or the end of the input; exit status 0."""
    spin_briefly()  # both before torch is imported
    tune_cpu_allocator()
    from torchtitan.commands import model_session
    from torchtitan.data.chat_template import read_chat_template
    from torchtitan.training.pretrained import describe_pretrained

    place = model_session.read_place()
    params = model_session.sampling_of(options)
    if problems := params.problems():
        raise ConfigError(problems)
    found = describe_pretrained(expand_path(options.checkpoint), options.tokenizer)
    model_session.mesh_of(options, found, place.world_size)
    template = read_chat_template(found.folders)
    conversation = Conversation(found, template, options.max_new_tokens, options.system)
    conversation.prompt_with("x")  # finds a template that does not render
    conversation.turns = []
    limits = model_session.limits_of(options, found, template.end_of_turn(found.tokenizer))
    with model_session.open_session(options, found, place, _PATIENCE_SECONDS) as session:
        if session.world.is_main and sys.stdin.isatty():
            print(_HELP, file=sys.stderr)
        while (line := _next_line(session)) is not None:
            _answer(line, conversation, session, limits, params)
    return DONE


@dataclass
class Conversation:
    """The turns so far, which fit the model's longest sequence together with an answer."""

    found: Pretrained
    template: ChatTemplate
    max_new_tokens: int
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    num_answers: int = 0

    def prompt_with(self, text: str) -> tuple[list[int], int]:
        """Add the user's turn; return the prompt and how many of the oldest turns were forgotten.

        Raises ConfigError, and leaves the turns as they were, for a text that is too long even
        alone, or that the template rejects.
        """
        longest = self.found.args.max_seq_len
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [*self.turns, {"role": "user", "content": text}]
        for dropped in range(0, len(turns), 2):  # a question with its answer
            ids = self.template.encode([*system, *turns[dropped:]], self.found.tokenizer)
            room = longest - len(ids)
            if room >= min(self.max_new_tokens, longest // 2):
                self.turns = turns[dropped:]
                return ids, dropped
        problem = f"has {len(ids)} tokens, which leave no room in the model's {longest}"
        raise ConfigError(ConfigIssue("the message", problem, "shorten it"))


def _next_line(session: ModelSession) -> str | None:
    """Return the user's next line on all ranks; None at the end."""
    line: str | None = None
    if session.world.is_main:
        try:
            if sys.stdin.isatty():
                print("> ", end="", flush=True)
            line = sys.stdin.readline() or None
        except (KeyboardInterrupt, UnicodeDecodeError):
            line = None
    shared: str | None = session.world.broadcast_json(line)
    return None if shared is None or shared.strip() in ("/exit", "/quit") else shared.strip()


def _answer(
    line: str,
    conversation: Conversation,
    session: ModelSession,
    limits: Limits,
    params: SamplingParams,
) -> None:
    """Obey a command, or answer a message."""
    from torchtitan.generation.generate import Prompt

    word, _, rest = line.partition(" ")
    if word in ("/reset", "/system"):
        conversation.turns = []
        if word == "/system":
            conversation.system = rest.strip() or None
        return _say(session, "The conversation starts anew.")
    if word.startswith("/"):
        return _say(session, f"{word} is not a command: {_HELP}")
    if not line:
        return None
    try:
        ids, forgotten = conversation.prompt_with(line)
    except ConfigError as error:
        return _say(session, f"error: {error}")
    if forgotten:
        _say(session, f"The oldest {forgotten} turns are forgotten: the longest sequence is full.")
    on_text = _print_piece if session.world.is_main else None
    prompt = Prompt(conversation.num_answers, ids)
    (completion,) = session.generator.generate([prompt], limits, params, on_text)
    if session.world.is_main:
        print(flush=True)
    if completion.finish_reason == "length":
        _say(session, f"Cut off after {len(completion.ids)} tokens (--max-new-tokens).")
    conversation.num_answers += 1
    conversation.turns.append({"role": "assistant", "content": completion.text})
    return None


def _print_piece(number: int, text: str) -> None:
    print(text, end="", flush=True)


def _say(session: ModelSession, text: str) -> None:
    if session.world.is_main:
        print(text, file=sys.stderr, flush=True)
