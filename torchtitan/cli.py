"""The command line `torchtitan COMMAND ...`: reads it, runs the command, prints errors.

`commands/table.py` has the commands. A command's function is `run` in `commands/NAME.py`, which is
imported when the command runs. None of this imports torch.
"""

import codecs
import importlib
import io
import os
import select
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import torchtitan.utils.host  # noqa: F401  starts the clock
from torchtitan.commands.table import parse
from torchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    ConfigIssue,
    DataError,
    NonFiniteError,
)
from torchtitan.config.exit_codes import CONFIG, DONE, exit_code_of
from torchtitan.utils.environment import (
    EnvironmentFaults,
    is_quiet_rank,
    is_torchrun_s,
    read_environment,
)
from torchtitan.utils.processes import StopRequested

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
