"""The sides of `bisect`: configs of one step, and the processes that train it. No torch."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torchtitan.checkpoint.decision import changed_config
from torchtitan.checkpoint.stored_run import StoredRun
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.load import load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import config_path
from torchtitan.config.toml_text import config_toml_text
from torchtitan.training import replay
from torchtitan.weights.recognise import kind_of

FLOAT64 = [
    f"--training.{key}=float64"
    for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce")
]
_TENSORS, _LOG, _CONFIG = "tensors", "log.txt", "side.toml"


@dataclass(frozen=True)
class Side:
    """What the user wrote for a side, A or B."""

    name: str
    path: Path
    settings: list[str]
    mesh: dict[str, int] | None
    step: int | None
    python: str

    @property
    def is_recorded(self) -> bool:
        """Return whether it is a folder of `debug.record_tensors`."""
        return self.path.is_dir() and any(self.path.glob("backward-*.json"))

    @property
    def is_checkpoint(self) -> bool:
        """Return whether it is weights, without a config to train them by."""
        return not self.is_recorded and kind_of(self.path) is not None

    def refuse(self, text: str, fix: str) -> ConfigError:
        """Return the error that it cannot be used."""
        return ConfigError(ConfigIssue(self.name, text, fix, str(self.path)))


class _SideParser(argparse.ArgumentParser):
    """Reports what is wrong with a side as ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(ConfigIssue(self.prog, message, "see torchtitan bisect --help"))


def read_side(name: str, text: str) -> Side:
    """Return the side that the user calls `name`. Raises ConfigError."""
    parser = _SideParser(prog=name, add_help=False, allow_abbrev=False)
    parser.add_argument("path")
    parser.add_argument("--mesh", type=_mesh)
    parser.add_argument("--step", type=int)
    parser.add_argument("--python", default=sys.executable)
    try:
        options, settings = parser.parse_known_args(shlex.split(text))
    except ValueError as error:  # a quotation mark without the other one
        parser.error(str(error))
    path = Path(expand_path(str(config_path(options.path))))
    side = Side(name, path, settings, options.mesh, options.step, options.python)
    if not path.exists():
        raise side.refuse("does not exist", "name a config, a run, a checkpoint or a recorded step")
    return side


@dataclass(frozen=True)
class Recipe:
    """The training of a side, ready to be started."""

    side: Side
    folder: Path
    config: JobConfig

    @property
    def tensors(self) -> Path:
        """The folder that the ranks record to."""
        return self.folder / _TENSORS

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return replay.Prepared(self.config, self.folder, 0).world_size

    @property
    def title(self) -> str:
        """A line on it for the user."""
        degrees = replay.degrees_of(self.config).items()
        mesh = ", ".join(f"{axis} {n}" for axis, n in degrees if n > 1) or "one process"
        training = self.config.training
        return f"{self.side.path} (step {training.steps}, {mesh}, {training.dtype})"

    def train(self) -> None:
        """Train the step. Raises ConfigError with the end of the output if that fails."""
        file = self.folder / _CONFIG
        file.write_text(config_toml_text(self.config), encoding="utf-8")
        words = [self.side.python]
        if self.world_size > 1:
            words += ["-m", "torch.distributed.run", f"--nproc_per_node={self.world_size}"]
            words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        words += ["-m", "torchtitan.train", f"--job.config_file={file}"]
        log = self.folder / _LOG
        code = run_words(words, log)
        if not any(self.tensors.glob("update-*.json")):
            end = "\n".join(log.read_text("utf-8", "replace").strip().splitlines()[-20:])
            text = f"came to no end of step {self.config.training.steps} (exit status {code})"
            raise self.side.refuse(f"{text}:\n{end}\n", "see its own messages above")


def run_words(words: Sequence[str], log: Path) -> int:
    """Run a command line with its output in a file; return its exit status."""
    with log.open("wb") as output:
        return subprocess.run(words, stdout=output, stderr=output, check=False).returncode


def recipe(side: Side, other: Side, folder: Path, settings: Sequence[str]) -> Recipe:
    """Return how to train a side, in `folder`, which is made. Raises ConfigError."""
    folder.mkdir(parents=True)
    own = [*settings, *side.settings]
    if side.is_checkpoint:
        if other.is_checkpoint or other.is_recorded:
            raise side.refuse("is weights, and neither side has a config", "name one for a side")
        load = {"initial_load_path": str(side.path.resolve()), "initial_load_model_only": True}
        load["enable"] = True
        config = _config(other, [*settings, *other.settings, *side.settings], side, folder)
        config = changed_config(config, checkpoint=load)
    else:
        config = _config(side, own, side, folder)
    changed: dict[str, Any] = {"record_tensors": str(folder / _TENSORS)}
    config = changed_config(config, debug=changed, job={"dump_folder": str(folder / "run")})
    return Recipe(side, folder, config)


def with_same_batch(recipe: Recipe, like: Recipe) -> Recipe:
    """Return the recipe with the batch of `like`, where it says nothing of its own."""
    wanted, own = (RunContext(r.config, r.world_size, "cpu") for r in (like, recipe))
    training = {"global_batch_size": wanted.global_batch_size}
    if recipe.config.training.global_batch_size > 0:
        training = {"global_batch_size": own.global_batch_size}
    config = changed_config(recipe.config, training=training)
    if config.data.lanes is None:
        config = changed_config(config, data={"lanes": wanted.num_lanes})
    config = replay.on_mesh(config, replay.degrees_of(config))
    return Recipe(recipe.side, recipe.folder, config)


def _config(source: Side, settings: Sequence[str], side: Side, folder: Path) -> JobConfig:
    """Return the config of a step: that of `source`, and mesh and step of `side`."""
    step = side.step if side.step is not None else source.step
    if source.path.is_dir():
        if not StoredRun(source.path, "checkpoint").is_run:
            raise source.refuse("is no run, checkpoint or recorded step", "name one, or a config")
        if step is None:
            raise source.refuse("is a run", "say which step to compare, with --step N")
        return replay.prepare(source.path, step, folder, side.mesh, settings).config
    config = load_config([str(source.path), *settings]).config
    mesh = side.mesh or replay.degrees_of(config)
    return replay.quiet(replay.on_mesh(config, mesh), 1 if step is None else step)


def _mesh(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    mesh = {axis.strip(): int(degree) for axis, _, degree in pairs}
    if unknown := set(mesh) - set(replay.DEGREES):
        raise argparse.ArgumentTypeError(f"{unknown.pop()} is no axis of a mesh")
    return mesh
