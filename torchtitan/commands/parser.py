"""The parser of the command line: argparse, with errors as ConfigError.

Words that argparse does not know are left to `config/cli_args.py` for commands that take settings
(`--section.key value`), and rejected for all others.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from torchtitan.commands.elsewhere import elsewhere
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.suggest import did_you_mean
from torchtitan.utils.redaction import redact


class Command(NamedTuple):
    """A command: its line in the help, and what adds its arguments (and describes it at length).

    `group`: the task under which `torchtitan --help` lists it.
    """

    summary: str
    add_arguments: "Callable[[CommandParser], None]" = lambda _: None
    takes_settings: bool = False
    group: str = ""


class CommandParser(argparse.ArgumentParser):
    """Reports bad arguments as ConfigError, with the usage as the fix."""

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.set_defaults(parser=self, is_group=False)
        self._commands: Mapping[str, Any] = {}
        self._groups: dict[str, list[str]] = {}

    def add_commands(self, commands: "Mapping[str, Command]", dest: str) -> None:
        """Add a parser for each command."""
        self.set_defaults(is_group=True)
        action = self.add_subparsers(dest=dest, metavar="COMMAND", title="commands")
        self._commands = action.choices
        width = max(map(len, commands))
        for name, command in commands.items():
            if command.group:
                line = f"  {name:<{width}}  {command.summary}"
                self._groups.setdefault(command.group, []).append(line)
            text = inspect.cleandoc(command.add_arguments.__doc__ or command.summary)
            parser = action.add_parser(
                name, help=command.summary, description=text, add_help=name != "train"
            )
            command.add_arguments(parser)
            if command.takes_settings:
                parser.set_defaults(settings=[])
                file = "" if parser._get_positional_actions() else "[FILE] "
                parser.usage = f"{parser.usage_text()} {file}[--section.key value ...]"

    def format_help(self) -> str:
        """Return the help, with commands below their groups, which argparse does not have."""
        if not self._groups:
            return super().format_help()
        groups = ["\n".join([f"{group}:", *lines]) for group, lines in self._groups.items()]
        parts = [self.format_usage().rstrip(), self.description, *groups, self.epilog]
        return "\n\n".join(filter(None, parts)) + "\n"

    def help_texts(self) -> Iterator[tuple[str, str]]:
        """Yield the words of each command, without the program's, and its help text."""
        for parser in self._commands.values():
            yield parser.prog.partition(" ")[2], parser.format_help()
            yield from parser.help_texts()

    def usage_text(self) -> str:
        """Return the usage in one line."""
        return " ".join(word for word in self.format_usage().split()[1:] if word != "[-h]")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Suggest a command for one that is misspelt; else as argparse does."""
        word, _, _ = next(iter(args or ()), "").partition("=")
        is_option = word.startswith("-") and "." not in word  # else it is a setting
        if self._commands and word and word not in self._commands and not is_option:
            key = f"{self.prog} {word}".removeprefix("torchtitan ")
            known = None if " " in self.prog else elsewhere(args)
            fix = known or did_you_mean(word, self._commands)
            raise ConfigError(ConfigIssue(key, "is not a command", fix))
        settings: list[str] = []
        if self.get_default("settings") is not None:
            args, settings = _split_settings(args or ())
        namespace, rest = super().parse_known_args(args, namespace)
        return namespace, [*rest, *settings]

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        name = self.prog.removeprefix("torchtitan ")
        raise ConfigError(ConfigIssue(name, redact(message), f"write `{self.usage_text()}`"))


def _split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part `--section.key value ...` from the rest: argparse rejects a value such as `-hello`."""
    others: list[str] = []
    settings: list[str] = []
    target = others
    for word in words:
        if word.startswith("--"):
            target = settings if "." in word.partition("=")[0] else others
        elif word == "-h":
            target = others
        target.append(word)
    return others, settings
