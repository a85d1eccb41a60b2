"""The command `torchtitan WORD ...`. Words import what they need when they run, and no sooner."""

import codecs
import io
import os
import select
import sys
import time
from collections.abc import Callable, Sequence

import torchtitan.utils.uptime  # noqa: F401  its clock starts
from torchtitan import __version__
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
    ProcessEnvironment,
    is_quiet_rank,
    read_environment,
)
from torchtitan.utils.launchers import is_torchrun_s

_PATIENCE_SECONDS = 60.0
"""How long a rank that refuses waits for rank 0, which may look at many files before it answers."""
_TO_PRINT_SECONDS = 5.0
"""How long rank 0 may take to print what all ranks know."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)
    status = DONE
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _give_up_stdout():
            raise
    return status


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Escape what a terminal cannot print as TOML and JSON do, so that it reads back."""
    assert isinstance(error, UnicodeEncodeError)
    codes = map(ord, error.object[error.start : error.end])
    return "".join(f"\\u{c:04x}" if c < 0x10000 else f"\\U{c:08x}" for c in codes), error.end


_ESCAPES = "torchtitan.escapes"
codecs.register_error(_ESCAPES, _escaped)


def _give_up_stdout() -> bool:
    """Whether the reader of stdout (`head`, for example) has gone; then nothing more is sent."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), select.POLLERR)
    if not reader.poll(0):
        return False
    with open(os.devnull, "w") as nowhere:  # Python flushes once more when it ends
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return True


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE
    if arguments[0] in ("--version", "version"):
        print(f"torchtitan {__version__}")
        return DONE
    word, *rest = arguments
    try:
        if word not in _WORDS:
            raise ConfigError(ConfigIssue(word, "is not a command", did_you_mean(word, _WORDS)))
        return _WORDS[word][0](rest)
    except ConfigError as error:
        is_run = word == "train" and not any(text.startswith("--check") for text in rest)
        _print_problems(error, others_wait=is_run and not error.known_to_all)
        return CONFIG
    except (DataError, CheckpointError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt as error:
        return exit_code_of(error)


def train(argv: list[str]) -> int:
    """Train, or with `--check` only look whether training could start."""
    from torchtitan.commands import train as train_word

    return train_word.run(argv)


def _config(argv: list[str]) -> int:
    from torchtitan.commands import config as config_words

    return config_words.run(argv)


def _tokenize(argv: list[str]) -> int:
    from torchtitan.commands import tokenize as tokenize_word

    return tokenize_word.run(argv)


def _convert(argv: list[str]) -> int:
    from torchtitan.commands import convert as convert_words

    return convert_words.run(argv)


def _list(argv: list[str]) -> int:
    from torchtitan.commands import list_names as list_words

    return list_words.run(argv)


def _download(argv: list[str]) -> int:
    from torchtitan.commands import download

    return download.run(argv)


def _doctor(argv: list[str]) -> int:
    from torchtitan.commands.doctor import doctor

    return doctor.run(argv)


_WORDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (train, "train from a TOML file; --check only looks whether it could start"),
    "tokenize": (_tokenize, "make files of tokens from a dataset, to train on without tokenising"),
    "config": (_config, "show, copy or convert a config; schema; docs"),
    "convert": (_convert, "a checkpoint into a file of torch.save"),
    "list": (_list, "configs, models, datasets, optimizers and more that are there"),
    "download": (_download, "a model's tokenizer, or other files of it, from the hub"),
    "doctor": (_doctor, "what is here, what a run would use, what is wrong"),
}


def _overview() -> str:
    lines = ["usage: torchtitan WORD ...", ""]
    lines += [f"  {word:<8} {text}" for word, (_, text) in _WORDS.items()]
    lines += ["", "torchtitan train --help lists every setting; torchtitan --version."]
    return "\n".join(lines)


def _print_problems(error: ConfigError, others_wait: bool) -> None:
    """Print the problems. At the start `others_wait`: then see to it that all ranks end.

    Under torchrun, which mixes the output of all ranks and ends all when one does, rank 0 prints
    what all find alike. The others do not end before that, and print only what is theirs alone.
    """
    hears_rank_0 = is_quiet_rank() and is_torchrun_s()
    problems = [problem for problem in error.problems if problem.local or not hears_rank_0]
    _print(problems)
    if others_wait and (place := _place()) is not None:
        from torchtitan.distributed.context import share_refusal

        if not share_refusal(place, error.problems, _PATIENCE_SECONDS):
            _print([problem for problem in error.problems if problem not in problems])
    elif hears_rank_0:
        time.sleep(_TO_PRINT_SECONDS)


def _place() -> ProcessEnvironment | None:
    """This process's place among several; None if it is alone, or does not know."""
    try:
        place = read_environment()
    except EnvironmentFaults:
        return None
    return place if place.world_size > 1 else None


def _print(problems: Sequence[ConfigIssue]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        print(f"{len(problems)} {noun}; nothing was started", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
