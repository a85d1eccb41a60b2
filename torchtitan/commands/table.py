"""The commands of `torchtitan`, in one table, with their arguments."""

import argparse
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from torchtitan import __version__
from torchtitan.commands.bisect_options import add_bisect_arguments
from torchtitan.commands.checkpoint_options import (
    add_diff_arguments,
    add_ls_arguments,
    add_prune_arguments,
    add_verify_arguments,
)
from torchtitan.commands.data_options import add_show_arguments
from torchtitan.commands.elsewhere import INSTEAD, elsewhere
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
from torchtitan.commands.parser import Command, CommandParser
from torchtitan.commands.plot_options import add_plot_arguments
from torchtitan.commands.replay_options import add_replay_arguments
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.config.shipped import is_config

_DESCRIPTION = """Train language models from a TOML file. To begin, train a small one here:

  torchtitan train debug_model"""
_EPILOG = """Go on:
  torchtitan help COMMAND           a command, such as train
  torchtitan help training.steps    a setting of the TOML, with an example
  torchtitan completion --help      complete commands, settings and configs with the Tab key"""


def build_parser() -> CommandParser:
    """Return the parser of the whole command line, with one of its own for each command."""
    parser = CommandParser(prog="torchtitan", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"torchtitan {__version__}")
    parser.add_commands(COMMANDS, dest="command")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Read a command line; None after printing a help text or the version.

    `settings` of the result holds the config file and the flags of settings, unread. Raises
    ConfigError.
    """
    parser = build_parser()
    if argv and argv[0] == "version":
        argv = ["--version"]
    if argv and argv[0] == "help":
        argv = _help_command(argv[1:])
    try:
        options, rest = parser.parse_known_args(argv)
    except SystemExit:
        return None
    if "settings" in options:
        options.settings += rest
        return options
    words = vars(options).get("prompts", vars(options).get("runs"))
    if words is not None and not any(word.startswith("-") for word in rest):
        words += rest  # argparse takes positional arguments in one place only
        return options
    if rest:
        flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
        known = f"does not know {', '.join(flags)}" if flags else "takes no more arguments"
        options.parser.error(known)  # without values: one may be a token
    if options.is_group:
        options.parser.print_help()
        return None
    return options


def _help_command(words: Sequence[str]) -> list[str]:
    """Return the command line that `torchtitan help WORDS` is short for."""
    if words[:1] == ["train"]:
        return ["train", "--help", *words[1:]]
    if not words or words[0] in COMMANDS:
        return [*words, "--help"]
    names = {name.rpartition(".")[2] for name in (*known_keys(), *known_sections())}
    is_setting = "." in words[0] or words[0] in names
    if words[0] in INSTEAD and not is_setting:  # perhaps the name of a loss, too
        from torchtitan.commands.list import lists

        is_setting = any(words[0] in (known or ()) for known in lists().values())
    is_command = elsewhere(words) or get_close_matches(words[0], COMMANDS, cutoff=0.75)
    return [*words, "--help"] if is_command and not is_setting else ["train", "--help", *words]


def _help(parser: CommandParser) -> None:
    """Explain a command, a section of the TOML, or a setting; without TOPIC list the commands."""
    # `parse` replaces it by `TOPIC --help`.
    parser.add_argument(
        "topic", metavar="TOPIC", nargs="*", help="such as export, or training.steps"
    )


def _train(parser: CommandParser) -> None:
    """Train from a TOML file: a path, or the name of one of `torchtitan list configs`.

    A setting on the command line wins over the file. The same command again resumes the run.
    """
    parser.add_argument(
        *("-h", "--help"),
        metavar="TOPIC",
        nargs="?",
        action=_Help,
        default="",
        const="overview",
        help="list the sections; of a section its settings; explain a setting; all: every setting",
    )
    parser.add_argument(
        "--check",
        metavar="full",
        nargs="?",
        action=_Check,
        default="",
        help="only check that the run could start, with WORLD_SIZE processes; full: with the"
        " hardware of this machine, too",
    )


class _Help(argparse.Action):
    """`--help`, `--help TOPIC`; a config after it is that of a run, whose modules add settings."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Set `help` to the topic, which another module than that of `train` prints."""
        namespace.command, namespace.help = "setting_help", values
        if is_config(values):
            namespace.help, namespace.settings = self.const, [values]


class _Check(argparse.Action):
    """`--check` or `--check full`; any other word after it is the config file."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Set `check` to "plain" or "full"."""
        namespace.check = "full" if values == "full" else "plain"
        if values not in (None, "full"):
            namespace.settings = [values]


def _tokenize(parser: CommandParser) -> None:
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


def _config(parser: CommandParser) -> None:
    parser.add_commands(_CONFIG_COMMANDS, dest="action")


def _data(parser: CommandParser) -> None:
    parser.add_commands(_DATA_COMMANDS, dest="action")


def _checkpoint(parser: CommandParser) -> None:
    parser.add_commands(_CHECKPOINT_COMMANDS, dest="action")


def _config_copy(parser: CommandParser) -> None:
    parser.add_argument("name", metavar="NAME", help="one of `torchtitan list configs`")
    parser.add_argument("file", metavar="FILE", help="a new file, or a folder")


def _config_diff(parser: CommandParser) -> None:
    """Print the settings whose values differ, with defaults and bases filled in.

    A and B are TOMLs, names of `torchtitan list configs` or run folders. Marked "may change" is
    what may differ between two starts of one run, with the reason. The exit status is 0, whether
    there is a difference or not.
    """
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")


def _config_convert(parser: CommandParser) -> None:
    parser.add_argument("old", metavar="OLD.toml")
    parser.add_argument("new", metavar="NEW.toml", nargs="?", help="default: stdout")


def _list(parser: CommandParser) -> None:
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


def _completion(parser: CommandParser) -> None:
    """Print a script with which a shell completes commands, options, settings and names.

    Write it where the shell looks for such scripts, and open a new shell:

      torchtitan completion bash > ~/.local/share/bash-completion/completions/torchtitan
      torchtitan completion zsh > ~/.zfunc/_torchtitan
      torchtitan completion fish > ~/.config/fish/completions/torchtitan.fish

    bash needs its package bash-completion; without it, source the script in ~/.bashrc. zsh needs
    `fpath+=~/.zfunc; autoload -Uz compinit; compinit` in ~/.zshrc. Write the script again after an
    update: it holds the names of this version, and of the packages that are installed.
    """
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")


def _doctor(parser: CommandParser) -> None:
    """Report what is installed, what a run would use and what is wrong, one line each.

    Lines begin with `ok`, `WRONG` (with a fix), `look` (perhaps intended) or `-` (information). The
    exit status is 1 if anything is WRONG. With a config, doctor checks what that needs; under
    torchrun (`torchrun --nproc_per_node N -m torchtitan doctor`) it measures each axis of the mesh.
    Alone it ends with settings that would be faster on this machine, as measured in a few seconds.
    """
    parser.add_argument("--quick", action="store_true", help="measure no speed")


_TRAIN, _CONFIGS, _DATA, _WEIGHTS = (
    "Train and watch",
    "Configs and help",
    "Data",
    "Weights in and out",
)
_USE, _CHECKPOINTS, _DEBUG = "Use a model", "Checkpoints", "Find what is wrong"
COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train from a TOML file; --check only checks that it could start", _train, True, _TRAIN
    ),
    "status": Command("show where a run stands", add_status_arguments, group=_TRAIN),
    "plot": Command("draw the curves of runs", add_plot_arguments, group=_TRAIN),
    "config": Command(
        "show, compare, copy or convert a config; schema; docs", _config, group=_CONFIGS
    ),
    "list": Command("list configs, models, datasets, optimizers and more", _list, group=_CONFIGS),
    "help": Command(
        "explain a command, a section of the TOML, or a setting", _help, group=_CONFIGS
    ),
    "completion": Command(
        "complete with the Tab key in bash, zsh or fish", _completion, group=_CONFIGS
    ),
    "tokenize": Command("tokenise a dataset into files to train on", _tokenize, True, _DATA),
    "data": Command("show rows as they are trained", _data, group=_DATA),
    "download": Command(
        "download files of a model from the hub", add_download_arguments, group=_WEIGHTS
    ),
    "convert": Command(
        "convert a checkpoint to another format", add_convert_arguments, group=_WEIGHTS
    ),
    "export": Command(
        "write a checkpoint for transformers or llama.cpp", add_export_arguments, group=_WEIGHTS
    ),
    "upload": Command(
        "upload a folder to the Hugging Face hub", add_upload_arguments, group=_WEIGHTS
    ),
    "chat": Command("talk with a chat model", add_chat_arguments, group=_USE),
    "generate": Command("continue prompts with any checkpoint", add_generate_arguments, group=_USE),
    "evaluate": Command("measure on lm-eval's tasks", add_evaluate_arguments, group=_USE),
    "checkpoint": Command(
        "list, verify, compare or delete steps of a run", _checkpoint, group=_CHECKPOINTS
    ),
    "inspect": Command(
        "show what a checkpoint holds, or how two differ", add_inspect_arguments, group=_CHECKPOINTS
    ),
    "doctor": Command("check the installation, the machine and a config", _doctor, True, _DEBUG),
    "bisect": Command(
        "find where two ways to train a step differ", add_bisect_arguments, True, _DEBUG
    ),
    "replay": Command("repeat a step of a run and compare", add_replay_arguments, True, _DEBUG),
}
"""The commands in the order of the help, by `group`."""
_DATA_COMMANDS = {
    "show": Command("print rows with the trained tokens marked", add_show_arguments, True),
}
_CHECKPOINT_COMMANDS = {
    "ls": Command("list the steps of a run", add_ls_arguments),
    "verify": Command("compare every byte of steps with its digest", add_verify_arguments),
    "diff": Command("show how two checkpoints differ", add_diff_arguments),
    "prune": Command("delete old steps of a run", add_prune_arguments),
}
_CONFIG_COMMANDS = {
    "show": Command("print the resolved values, each with its origin", takes_settings=True),
    "diff": Command("show the settings in which two configs differ", _config_diff),
    "copy": Command("copy a shipped config to a file", _config_copy),
    "convert": Command("write a TOML of an older TorchTitan with today's keys", _config_convert),
    "schema": Command("print the JSON schema of the TOML file, for editors"),
    "docs": Command("print the reference page, in Markdown"),
}
