"""The command line `torchtitan COMMAND ...`: a table of commands, read by argparse.

A command's function is `run` in `commands/COMMAND.py`, which is imported when the command runs.
What argparse does not know is left to `config/cli_args.py` for commands that take settings
(`--section.key value`), and rejected for all others. None of this imports torch.
"""

import argparse
import codecs
import importlib
import inspect
import io
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torchtitan.utils.host  # noqa: F401  starts the clock
from torchtitan import __version__
from torchtitan.commands.bisect_options import add_bisect_arguments
from torchtitan.commands.checkpoint_options import (
    add_diff_arguments,
    add_ls_arguments,
    add_prune_arguments,
    add_verify_arguments,
)
from torchtitan.commands.data_options import add_show_arguments
from torchtitan.commands.evaluation_options import add_evaluate_arguments
from torchtitan.commands.export_options import (
    add_convert_arguments,
    add_download_arguments,
    add_export_arguments,
    add_upload_arguments,
)
from torchtitan.commands.generation_options import (
    add_chat_arguments,
    add_generate_arguments,
    add_option,
    positive,
)
from torchtitan.commands.inspect_options import add_inspect_arguments, add_status_arguments
from torchtitan.commands.replay_options import add_replay_arguments
from torchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    ConfigIssue,
    DataError,
    NonFiniteError,
)
from torchtitan.config.exit_codes import CONFIG, DONE, exit_code_of
from torchtitan.config.suggest import did_you_mean
from torchtitan.utils.environment import (
    EnvironmentFaults,
    is_quiet_rank,
    is_torchrun_s,
    read_environment,
)
from torchtitan.utils.processes import StopRequested
from torchtitan.utils.redaction import redact

_PATIENCE_SECONDS = 60.0  # of a failing rank for rank 0, which may look at many files first
_TO_PRINT_SECONDS = 5.0  # that other ranks leave rank 0 to print a problem that all have


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)
    status = DONE
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _give_up_stdout():
            raise
    return status


def _run(argv: list[str]) -> int:
    options = None
    try:
        options = parse(argv)
        if options is None:
            return DONE
        command = importlib.import_module(f"torchtitan.commands.{options.command}")
        return command.run(options)
    except ConfigError as error:
        starts = options is not None and options.command == "train" and not options.check
        _print_issues(error, at_start=starts and not error.known_to_all)
        return CONFIG
    except (DataError, CheckpointError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    except (KeyboardInterrupt, StopRequested) as error:
        return exit_code_of(error)


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Read a command line; None after printing a help text or the version.

    `settings` of the result holds the config file and the flags of settings, unread. Raises
    ConfigError.
    """
    parser = _Parser(prog="torchtitan", description="Train language models from a TOML file.")
    parser.add_argument("--version", action="version", version=f"torchtitan {__version__}")
    parser.add_commands(_COMMANDS, dest="command")
    if argv and argv[0] in ("help", "version"):
        argv = [f"--{argv[0]}"]
    try:
        options, rest = parser.parse_known_args(argv)
    except SystemExit:
        return None
    if "settings" in options:
        options.settings += rest
        return options
    if "prompts" in options and not any(word.startswith("-") for word in rest):
        options.prompts += rest  # argparse takes positional arguments in one place only
        return options
    if rest:
        flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
        known = f"does not know {', '.join(flags)}" if flags else "takes no more arguments"
        options.parser.error(known)  # without values: one may be a token
    if options.is_group:
        options.parser.print_help()
        return None
    return options


class _Command(NamedTuple):
    """A command: its line in the help, and what adds its arguments (and describes it at length)."""

    summary: str
    add_arguments: "Callable[[_Parser], None]" = lambda _: None
    takes_settings: bool = False


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as ConfigError, with the usage as the fix."""

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.set_defaults(parser=self, is_group=False)
        self._commands: Mapping[str, Any] = {}

    def add_commands(self, commands: "Mapping[str, _Command]", dest: str) -> None:
        """Add a parser for each command."""
        self.set_defaults(is_group=True)
        action = self.add_subparsers(dest=dest, metavar="COMMAND", title="commands")
        self._commands = action.choices
        for name, command in commands.items():
            text = inspect.cleandoc(command.add_arguments.__doc__ or command.summary)
            parser = action.add_parser(
                name, help=command.summary, description=text, add_help=name != "train"
            )
            command.add_arguments(parser)
            if command.takes_settings:
                parser.set_defaults(settings=[])
                file = "" if parser._get_positional_actions() else "[FILE] "
                parser.usage = f"{parser.usage_text()} {file}[--section.key value ...]"

    def usage_text(self) -> str:
        """Return the usage in one line."""
        return " ".join(word for word in self.format_usage().split()[1:] if word != "[-h]")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Suggest a command for one that is misspelt; else as argparse does."""
        word = next(iter(args or ()), "")
        if self._commands and word and not word.startswith("-") and word not in self._commands:
            key = f"{self.prog} {word}".removeprefix("torchtitan ")
            fix = did_you_mean(word, self._commands)
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


def _train(parser: _Parser) -> None:
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--check", nargs="?", action=_Check, default="")


class _Check(argparse.Action):
    """`--check` or `--check full`; any other word after it is the config file."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Set `check` to "plain" or "full"."""
        namespace.check = "full" if values == "full" else "plain"
        if values not in (None, "full"):
            namespace.settings = [values]


def _tokenize(parser: _Parser) -> None:
    """Tokenise the dataset of a config once.

    A run reads the folder as training.dataset_path, and with the same data.lanes it sees the same
    samples as in the text. After a kill the same command continues; a finished folder is verified.

    These settings count: training.dataset_path, training.dataset, model.tokenizer_path,
    data.text_column, data.encoding, data.document_separator, data.add_bos, data.add_eos,
    data.lanes, data.max_document_mib, data.on_bad_row, data.max_bad_rows.
    """
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write to")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        help="processes; the output is the same for every number (default: one a core)",
    )
    parser.add_argument("--source", metavar="NAME", help="one of several [[data.sources]]")
    add_option(
        parser,
        "shard-mib",
        metavar="N",
        type=positive,
        default=256,
        help="MiB of text in each pair of files (default: 256)",
    )


def _config(parser: _Parser) -> None:
    parser.add_commands(_CONFIG_COMMANDS, dest="action")


def _data(parser: _Parser) -> None:
    parser.add_commands(_DATA_COMMANDS, dest="action")


def _checkpoint(parser: _Parser) -> None:
    parser.add_commands(_CHECKPOINT_COMMANDS, dest="action")


def _config_copy(parser: _Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="one of `torchtitan list configs`")
    parser.add_argument("file", metavar="FILE", help="a new file, or a folder")


def _config_convert(parser: _Parser) -> None:
    parser.add_argument("old", metavar="OLD.toml")
    parser.add_argument("new", metavar="NEW.toml", nargs="?", help="default: stdout")


def _list(parser: _Parser) -> None:
    """Print the names that a config may use, with the package or module that adds a name.

    Without NAME, all of these:

      configs      shipped TOMLs, for `torchtitan config copy`
      models       model.name, with the choices of model.flavor
      datasets     training.dataset
      tokenizers   model.tokenizer_path
      losses       loss.name, with the settings of [loss.args]
      optimizers   optimizer.name, with the keys of [optimizer] and of [optimizer.args]
      schedules    lr_scheduler.name, with the keys of [lr_scheduler]
      sinks        metrics.sinks, and the switches of the built-in ones
      handlers     model.handlers, with the settings of [handlers.NAME]
      masks        handlers.flex_attention.masks
    """
    parser.add_argument("names", metavar="NAME", nargs="*")
    parser.add_argument(
        *("--job.custom_import", "--job.custom-import"),
        dest="modules",
        metavar="MODULE",
        nargs="+",
        default=[],
        help="modules that register more names",
    )


def _doctor(parser: _Parser) -> None:
    """Report what is installed, what a run would use and what is wrong, one line each.

    Lines begin with `ok`, `WRONG` (with a fix), `look` (perhaps intended) or `-` (information). The
    exit status is 1 if anything is WRONG. With a config, doctor checks what that needs; under
    torchrun (`torchrun --nproc_per_node N -m torchtitan doctor`) it measures each axis of the mesh.
    """


_COMMANDS = {
    "train": _Command(
        "train from a TOML file; --check only checks that it could start", _train, True
    ),
    "tokenize": _Command("tokenise a dataset into files to train on", _tokenize, True),
    "data": _Command("show rows as they are trained", _data),
    "config": _Command("show, copy or convert a config; schema; docs", _config),
    "export": _Command("write a checkpoint for transformers or llama.cpp", add_export_arguments),
    "convert": _Command("convert a checkpoint to another format", add_convert_arguments),
    "upload": _Command("upload a folder to the Hugging Face hub", add_upload_arguments),
    "generate": _Command("continue prompts with any checkpoint", add_generate_arguments),
    "chat": _Command("talk with a chat model", add_chat_arguments),
    "evaluate": _Command("measure on lm-eval's tasks", add_evaluate_arguments),
    "checkpoint": _Command("list, verify, compare or delete steps of a run", _checkpoint),
    "inspect": _Command("show what a checkpoint holds, or how two differ", add_inspect_arguments),
    "status": _Command("show where a run stands", add_status_arguments),
    "bisect": _Command("find where two ways to train a step differ", add_bisect_arguments, True),
    "replay": _Command("repeat a step of a run and compare", add_replay_arguments, True),
    "list": _Command("list configs, models, datasets, optimizers and more", _list),
    "download": _Command("download files of a model from the hub", add_download_arguments),
    "doctor": _Command("check the installation, the machine and a config", _doctor, True),
}
_DATA_COMMANDS = {
    "show": _Command("print rows with the trained tokens marked", add_show_arguments, True),
}
_CHECKPOINT_COMMANDS = {
    "ls": _Command("list the steps of a run", add_ls_arguments),
    "verify": _Command("compare every byte of steps with its digest", add_verify_arguments),
    "diff": _Command("show how two checkpoints differ", add_diff_arguments),
    "prune": _Command("delete old steps of a run", add_prune_arguments),
}
_CONFIG_COMMANDS = {
    "show": _Command("print the resolved values, each with its origin", takes_settings=True),
    "copy": _Command("copy a shipped config to a file", _config_copy),
    "convert": _Command("write a TOML of an older TorchTitan with today's keys", _config_convert),
    "schema": _Command("print the JSON schema of the TOML file, for editors"),
    "docs": _Command("print the reference page, in Markdown"),
}


def _print_issues(error: ConfigError, at_start: bool) -> None:
    """Print the issues; at the start of a run, make all ranks end.

    torchrun mixes the output of all ranks and kills all when one ends. So rank 0 prints issues
    that all ranks have; the others wait for it, and print only what is theirs alone.
    """
    leaves_to_rank_0 = is_quiet_rank() and is_torchrun_s()
    own = [issue for issue in error.problems if issue.local or not leaves_to_rank_0]
    _print(own)
    place = None
    with suppress(EnvironmentFaults):
        place = read_environment()
    if at_start and place is not None and place.world_size > 1:
        from torchtitan.distributed.context import share_refusal

        if not share_refusal(place, error.problems, _PATIENCE_SECONDS):
            _print([issue for issue in error.problems if issue not in own])
    elif leaves_to_rank_0:
        time.sleep(_TO_PRINT_SECONDS)


def _print(issues: Sequence[ConfigIssue]) -> None:
    for issue in issues:
        print(f"error: {issue}", file=sys.stderr)
    if issues:
        noun = "problem" if len(issues) == 1 else "problems"
        print(f"{len(issues)} {noun}; nothing was started", file=sys.stderr, flush=True)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Escape what a terminal cannot print as TOML and JSON do, so that it reads back."""
    assert isinstance(error, UnicodeEncodeError)
    codes = map(ord, error.object[error.start : error.end])
    return "".join(f"\\u{c:04x}" if c < 0x10000 else f"\\U{c:08x}" for c in codes), error.end


_ESCAPES = "torchtitan.escapes"
codecs.register_error(_ESCAPES, _escaped)


def _give_up_stdout() -> bool:
    """Return True, and send nothing more, if the reader of stdout (say `head`) has gone."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), select.POLLERR)
    if not reader.poll(0):
        return False
    with open(os.devnull, "w") as nowhere:  # Python flushes once more when it ends
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
