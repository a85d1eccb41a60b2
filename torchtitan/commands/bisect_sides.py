"""The sides of `bisect`: configs of one step, and the processes that train it. No torch."""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torchtitan.checkpoint.decision import changed_config
from torchtitan.checkpoint.stored_run import StoredRun
from torchtitan.commands.replay import check
from torchtitan.commands.replay_options import mesh_degrees
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.load import load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import config_path
from torchtitan.config.toml_text import config_toml_text
from torchtitan.training import replay
from torchtitan.training.replay import Prepared, run_words
from torchtitan.weights.recognise import kind_of

FLOAT64 = [
    f"--training.{key}=float64"
    for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce")
]
_TENSORS, _CONFIG = "tensors", "side.toml"
_FAULT = re.compile(r"\b(ERROR|error|Error)\b")
_SHOWN_LINES = 10


@dataclass(frozen=True)
class Side:
    """A side as the user wrote it, A or B."""

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
        raise ConfigError(ConfigIssue(self.prog, message, "see `torchtitan bisect --help`"))


def read_side(name: str, text: str) -> Side:
    """Return the side that the user calls `name`. Raises ConfigError."""
    parser = _SideParser(prog=name, add_help=False, allow_abbrev=False)
    parser.add_argument("path")
    parser.add_argument("--mesh", type=mesh_degrees)
    parser.add_argument("--step", type=int)
    parser.add_argument("--python", default=sys.executable)
    try:
        options, settings = parser.parse_known_args(shlex.split(text))
    except ValueError as error:  # a quotation mark without the other one
        parser.error(str(error))
    path = Path(expand_path(str(config_path(options.path))))
    side = Side(name, path, settings, options.mesh, options.step, options.python)
    if unknown := sorted(set(options.mesh or ()) - set(replay.DEGREES)):
        parser.error(f"{unknown[0]} is no axis of a mesh")
    if not path.exists():
        raise side.refuse("does not exist", "name a config, a run, a checkpoint or a recorded step")
    return side


@dataclass(frozen=True)
class Recipe:
    """The training of a side, ready to be started."""

    side: Side
    prepared: Prepared

    @property
    def tensors(self) -> Path:
        """The folder that the ranks record to."""
        return self.prepared.file.parent / _TENSORS

    @property
    def title(self) -> str:
        """A line on it for the user."""
        config = self.prepared.config
        degrees = replay.degrees_of(config).items()
        mesh = ", ".join(f"{axis} {n}" for axis, n in degrees if n > 1) or "one process"
        return f"{self.side.path} (step {config.training.steps}, {mesh}, {config.training.dtype})"

    def check(self) -> None:
        """Write the config. Raises ConfigError for settings that do not fit the mesh."""
        self.prepared.file.write_text(config_toml_text(self.prepared.config), encoding="utf-8")
        check(self.prepared)

    def train(self) -> None:
        """Train the step. Raises ConfigError with what went wrong if there is nothing recorded."""
        log = self.prepared.file.with_name("log.txt")
        code = run_words(replay.words_of(self.prepared, self.side.python), log)
        if not any(self.tensors.glob("update-*.json")):
            lines = log.read_text("utf-8", "replace").strip().splitlines()
            faults = [line for line in lines if _FAULT.search(line)] or lines
            text = f"did not complete its step (exit status {code}):"
            fix = f"train it alone, with the config that --keep DIR leaves in {self.side.name}"
            raise self.side.refuse("\n  ".join([text, *faults[:_SHOWN_LINES]]), fix)


def recipe(
    side: Side,
    other: Side,
    folder: Path,
    settings: Sequence[str],
    formats: Sequence[str],
    like: Recipe | None,
) -> Recipe:
    """Return how to train a side, in `folder`, which is made. Raises ConfigError.

    `settings` are of both sides; `formats` win over those of the side. It has the batch and lanes
    of `like` where it leaves them open.
    """
    folder.mkdir(parents=True)
    source, words = side, [*settings, *side.settings, *formats]
    if side.is_checkpoint:
        if other.is_checkpoint or other.is_recorded:
            text = "is only weights, and no side has a config to train them with"
            raise side.refuse(text, 'write CONFIG.toml, or "RUN --step N", for one side')
        load = ["--checkpoint.enable=true", f"--checkpoint.initial_load_path={side.path.resolve()}"]
        load += ["--checkpoint.initial_load_model_only=true"]
        source, words = other, [*settings, *other.settings, *load, *side.settings, *formats]
    config = _config(source, words, side, folder, like)
    own = {"record_tensors": str(folder / _TENSORS)}
    config = changed_config(config, debug=own, job={"dump_folder": str(folder / "run")})
    return Recipe(side, Prepared(config, config, folder / _CONFIG, 0))


def _config(
    source: Side, settings: Sequence[str], side: Side, folder: Path, like: Recipe | None
) -> JobConfig:
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
    on_mesh = replay.on_mesh(config, mesh).model_copy(update={"training": config.training})
    model = on_mesh if like is None else like.prepared.config
    wanted = RunContext(model, math.prod(replay.degrees_of(model).values()), "cpu")
    if config.training.global_batch_size <= 0:
        config = changed_config(config, training={"global_batch_size": wanted.global_batch_size})
    if config.data.lanes is None:
        config = changed_config(config, data={"lanes": wanted.num_lanes})
    return replay.quiet(replay.on_mesh(config, mesh), 1 if step is None else step)
