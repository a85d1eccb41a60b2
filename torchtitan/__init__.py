"""A PyTorch-native training library driven by a TOML: change the mesh, keep the run.

From Python, in a script or a notebook:

    import torchtitan

    config = torchtitan.load_config("debug_model", {"training.steps": 20})
    run = torchtitan.train(config)              # resumes what is in job.dump_folder
    run.metrics()["loss"], run.status, run.checkpoints

    model, tokenizer = run.load()               # or torchtitan.load(PATH) for any checkpoint
    torchtitan.generate(model, tokenizer, "def ", max_new_tokens=50)

What is listed below is public, and so is what docs/guides/extending.md uses to add models, losses,
datasets and the like. Everything else is private, whatever its name, and may change in any release.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan.api.run import Run
    from torchtitan.api.text import generate, load
    from torchtitan.api.train import load_config, train
    from torchtitan.config import (
        CheckpointError,
        ConfigError,
        ConfigIssue,
        DataError,
        HangError,
        JobConfig,
        NonFiniteError,
    )

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConfigIssue",
    "DataError",
    "HangError",
    "JobConfig",
    "NonFiniteError",
    "Run",
    "generate",
    "load",
    "load_config",
    "train",
]

_HOMES = {"Run": "api.run", "generate": "api.text", "load": "api.text"}
_HOMES |= {"load_config": "api.train", "train": "api.train"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command line needs few of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'config')}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    """Return the public names, which `help` and completion show."""
    return [*globals(), *__all__]
