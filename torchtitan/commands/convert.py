"""`torchtitan convert KIND ...`: checkpoints in the formats of other programs. No torch."""

import os
from collections.abc import Callable
from pathlib import Path

from torchtitan.checkpoint.steps_folder import step_folders, step_name
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.config.suggest import did_you_mean

USAGE = """usage: torchtitan convert dcp-to-torch FOLDER FILE [--dtype float32|bfloat16|float16]
           the weights in a checkpoint, of this program (.../checkpoint/step-N) or any other that
           torch.distributed.checkpoint has saved, as one file that
           torch.load(FILE, weights_only=True, mmap=True) and torchtune read. Needs as much memory
           as the file will be large. --dtype converts; without it types stay as they are."""

_DTYPES = ("float32", "bfloat16", "float16")


def run(argv: list[str]) -> int:
    """Convert what the first argument names; exit status 0."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    kind, *rest = argv
    if kind not in _KINDS:
        raise ConfigError(ConfigIssue(f"convert {kind}", "is no kind", did_you_mean(kind, _KINDS)))
    if "-h" in rest or "--help" in rest:
        print(USAGE)
        return 0
    _KINDS[kind](rest)
    return 0


def _dcp_to_torch(argv: list[str]) -> None:
    places, dtype = _split_dtype(argv)
    if len(places) != 2:
        text = f"needs a folder and a file, and got {len(places)} names"
        fix = "torchtitan convert dcp-to-torch .../checkpoint/step-1000 model.pt"
        raise ConfigError(ConfigIssue("convert dcp-to-torch", text, fix))
    folder, file = (Path(expand_path(place)) for place in places)
    problems = []
    if not folder.is_dir():
        text = "is not a folder" if folder.exists() else "does not exist"
        fix = "name the folder of a checkpoint, such as outputs/checkpoint/step-1000"
        problems.append(ConfigIssue("FOLDER", text, fix, str(folder)))
    elif (steps := step_folders(folder)) and not (folder / ".metadata").exists():
        fix = f"name one, such as {folder / step_name(steps[-1])}"
        problems.append(ConfigIssue("FOLDER", "holds several checkpoints", fix, str(folder)))
    if os.path.lexists(file):
        problems.append(
            ConfigIssue("FILE", "is there already", "remove it, or choose another name", str(file))
        )
    elif not file.absolute().parent.is_dir():
        problems.append(
            ConfigIssue(
                "FILE", "lies in a folder that does not exist", "make the folder", str(file)
            )
        )
    if problems:
        raise ConfigError(problems)

    from torchtitan.commands.dcp_to_torch import dcp_to_torch

    dcp_to_torch(folder.resolve(), file.absolute(), dtype)


def _split_dtype(argv: list[str]) -> tuple[list[str], str | None]:
    places: list[str] = []
    dtype = None
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if flag != "--dtype":
            if argument.startswith("-"):
                raise ConfigError(
                    ConfigIssue(argument, "is unknown", "see torchtitan convert --help")
                )
            places.append(argument)
            continue
        dtype = value if equals else (rest.pop(0) if rest else "")
        if dtype not in _DTYPES:
            fix = f"choose from {', '.join(_DTYPES)}"
            raise ConfigError(ConfigIssue("--dtype", "is not a choice", fix, dtype))
    return places, dtype


_KINDS: dict[str, Callable[[list[str]], None]] = {"dcp-to-torch": _dcp_to_torch}
