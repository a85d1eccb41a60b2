"""`torchtitan doctor`: what is installed, what a run would use, and what is wrong, one line each.

Alone it checks this machine, and measures which settings would be faster on it; with a config also
what that needs; under torchrun all machines, the run folder that they share, and the speed of each
axis of the mesh. Users paste the output into bug
reports, so it prints no environment variables, which may hold secrets.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from torchtitan import __version__, preflight
from torchtitan.commands.doctor.findings import Finding, of_problem
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.exit_codes import DONE, FAILED
from torchtitan.config.load import LoadedConfig, load_config
from torchtitan.config.run_context import RunContext
from torchtitan.utils import environment as env
from torchtitan.utils.environment import adopt_place
from torchtitan.utils.host import spin_briefly

_NEEDED = (
    "torch",
    "numpy",
    "pydantic",
    "rich",
    "tokenizers",
    "tiktoken",
    "sentencepiece",
    "datasets",
    "pyarrow",
    "zstandard",
    "safetensors",
    "huggingface_hub",
    "tensorboard",
)
_EXTRAS = {
    "wandb": "metrics.enable_wandb",
    "transformers": "Hugging Face parity tests",
}


def run(options: argparse.Namespace) -> int:
    """Print a line for each finding; exit status 1 if something is wrong."""
    with suppress(env.EnvironmentFaults):  # a finding, below
        adopt_place()
    spin_briefly()  # as a run does, before torch is imported
    loaded = load_config(options.settings)
    quiet, wrong = env.is_quiet_rank(), False
    for finding in _findings(loaded, bool(options.settings), options.quick):
        wrong = wrong or finding.ok is False
        if not quiet:
            print(finding.line(), flush=True)
        elif finding.ok is False and not finding.common:  # perhaps on this rank only
            print(finding.line(), file=sys.stderr, flush=True)
    return FAILED if wrong else DONE


def _findings(loaded: LoadedConfig, has_config: bool, quick: bool) -> Iterator[Finding]:
    yield from _versions()
    try:
        adopt_place()
        place = env.read_environment()
    except env.EnvironmentFaults as faults:
        for fault in faults.faults:
            yield Finding(False, "launcher", f"{fault.name} {fault.problem}", fault.fix)
        place = env.ProcessEnvironment()
    else:
        text = f"rank {place.rank} of {place.world_size}" if place.launched else "one process"
        yield Finding(None, "launcher", text)
    try:
        import torch  # noqa: F401 - a broken installation is what this command is for
    except Exception as error:
        text = f"cannot be imported: {type(error).__name__}: {error}"
        yield Finding(False, "torch", text, "reinstall it as pytorch.org says for your system")
        return

    from torchtitan.commands.doctor.machine import context_of_machine, machine_findings
    from torchtitan.commands.doctor.processes import (
        existing_folder,
        processes_findings,
        run_folder_findings,
    )
    from torchtitan.commands.doctor.speed import speed_findings

    context = context_of_machine(loaded.config, place)
    yield from machine_findings(context, place)
    yield from run_folder_findings(loaded.config)
    if has_config and place.rank == 0:
        yield from _config_findings(context)
    if place.launched:
        for finding in processes_findings(context, place):
            yield replace(finding, common=True)
    elif not quick:
        text = "Measuring what would be faster, for a few seconds (not with --quick) ..."
        print(text, file=sys.stderr, flush=True)
        yield from speed_findings(context, existing_folder(loaded.config), has_config)


def _versions() -> Iterator[Finding]:
    folder = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    yield Finding(True, "torchtitan", f"{__version__} from {folder}")
    python = f"{platform.python_version()}, {sys.executable}"
    yield Finding(sys.version_info >= (3, 10), "python", python, "install Python 3.10 or newer")
    for package in _NEEDED:
        version = _version(package)
        text = version or "is not installed"
        yield Finding(version is not None, package, text, f"run `pip install {package}`")
    for package, purpose in _EXTRAS.items():
        yield Finding(None, package, f"{_version(package) or 'not installed'} ({purpose})")
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    text = compiler or "none, so the handler compile cannot work on CPUs"
    yield Finding(None, "C++ compiler", text)
    yield Finding(None, "machine", f"{platform.platform()}, {os.cpu_count()} cores, {_memory()}")


def _config_findings(context: RunContext) -> Iterator[Finding]:
    """Yield the problems that `train --check full` would report."""
    from torchtitan.commands.train import summary

    problems = import_custom_modules(context.config) or preflight.preflight(context)
    yield from (of_problem(problem) for problem in problems)
    if not preflight.errors_of(problems):
        yield Finding(True, "config", summary(context))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return "memory unknown"
    return f"{pages / 2**30:.1f} GiB"
