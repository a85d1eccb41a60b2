"""`torchtitan doctor`: what this machine offers, and what is missing, in one screen.

Meant to be pasted into a bug report; it prints no environment variables, which may hold secrets.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator

from torchtitan import __version__
from torchtitan.config.errors import ConfigError, Problem
from torchtitan.distributed.checks import MINIMUM_TORCH
from torchtitan.utils.environment import EnvironmentFaults, read_environment

_NEEDED = ("torch", "numpy", "pydantic", "tyro", "tokenizers", "tensorboard", "rich", "zstandard")
_EXTRAS = {"transformers": "Hugging Face parity tests", "torchao": "quantised training"}


def run(argv: list[str]) -> int:
    """Print one line a fact; exit status 1 when training could not work here."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: torchtitan doctor")
        return 0
    if argv:
        raise ConfigError(Problem("doctor", "takes no arguments", "remove them", argv[0]))
    healthy = True
    for ok, subject, finding in _findings():
        mark = {True: "ok     ", False: "MISSING", None: "-      "}[ok]
        healthy = healthy and ok is not False
        print(f"{mark} {subject}: {finding}")
    return 0 if healthy else 1


Finding = tuple[bool | None, str, str]
"""Good, bad or merely told (None); the subject; what was found."""


def _findings() -> Iterator[Finding]:
    yield True, "torchtitan", f"{__version__} from {os.path.dirname(os.path.dirname(__file__))}"
    yield sys.version_info >= (3, 10), "python", f"{platform.python_version()}, {sys.executable}"
    yield None, "machine", f"{platform.platform()}, {os.cpu_count()} cores, {_memory()}"
    for package in _NEEDED:
        version = _version(package)
        yield version is not None, package, version or f"run `pip install {package}`"
    for package, purpose in _EXTRAS.items():
        yield None, package, f"{_version(package) or 'not installed'} ({purpose})"
    if _version("torch"):
        yield from _torch_findings()
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    yield None, "C++ compiler", compiler or "none, so the compile handler cannot work on CPUs"
    free = shutil.disk_usage(".").free / 2**30
    yield None, "disk", f"{free:.1f} GiB free in {os.getcwd()}"
    yield _launcher()


def _torch_findings() -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken installation is what this command is for
        yield False, "torch", f"cannot be imported: {type(error).__name__}: {error}"
        return
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    yield installed >= MINIMUM_TORCH, "torch", "2.11 or newer is needed"
    yield dist.is_available() and dist.is_gloo_available(), "gloo", "talks between CPU processes"
    if not torch.cuda.is_available():
        yield None, "GPUs", f"none usable (torch built for CUDA {torch.version.cuda})"
        return
    for index in range(torch.cuda.device_count()):
        yield True, f"GPU {index}", torch.cuda.get_device_name(index)
    yield dist.is_nccl_available(), "nccl", "talks between GPUs"


def _launcher() -> Finding:
    try:
        place = read_environment()
    except EnvironmentFaults as faults:
        return False, "launcher", str(faults)
    words = f"rank {place.rank} of {place.world_size}" if place.launched else "none, one process"
    return None, "launcher", words


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
