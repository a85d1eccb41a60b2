"""The state of a run before one of its steps, rebuilt in a folder of its own. No torch.

`prepare` writes the config of a run that starts from the newest checkpoint before the step and ends
with the step; `launch` runs it by `torchtitan train`, on as many processes as its mesh has. Nothing
of it changes the run, which may still be going on.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from torchtitan.checkpoint.decision import changed_config
from torchtitan.checkpoint.manifest import Manifest
from torchtitan.checkpoint.steps_folder import inspect_steps, step_name
from torchtitan.checkpoint.stored_run import RECORD_NAME, STATUS_NAME, StoredRun
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import FAILED
from torchtitan.config.load import load_config
from torchtitan.config.schema import Evaluation, JobConfig, Metrics, Profiling, Validation
from torchtitan.config.toml_text import config_toml_text
from torchtitan.training.pretrained_config import copied_tokenizer
from torchtitan.training.step_record import read_records

CONFIG_NAME = "replay.toml"

DEGREES = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}
"""The axes of a mesh, and their keys in [parallelism]."""


@dataclass(frozen=True)
class Prepared:
    """A run that ends with the step to look at."""

    original: JobConfig
    """The config with which the run trained the step."""
    config: JobConfig
    """Its `job.dump_folder` is a new folder."""
    file: Path
    """The same config as TOML, for `torchtitan train`."""
    start: int
    """The step of the checkpoint that it starts from; 0: the beginning of the run."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return math.prod(degrees_of(self.config).values())


def prepare(
    run: Path,
    step: int,
    folder: Path,
    mesh: Mapping[str, int] | None = None,
    settings: Sequence[str] = (),
) -> Prepared:
    """Write to `folder`, which exists, the config of a run up to `step` from the state of `run`.

    `mesh`: degrees by axis, 1 for those left out; None for the mesh of the run. `settings` are
    words of a command line, `--section.key value`, which win over all but the folder. Modules of
    `job.custom_import` count only there: a stored config is data, and executes nothing. Raises
    ConfigError.
    """
    if unknown := sorted(set(mesh or ()) - set(DEGREES)):
        text = f"is no axis; the axes are {', '.join(DEGREES)}"
        raise ConfigError(ConfigIssue("--mesh", text, "write for example tp=2", unknown[0]))
    stored = StoredRun(run, "checkpoint")
    if not stored.is_run or stored.config is None:
        issue = ConfigIssue("RUN", "holds no run", "give a job.dump_folder", str(run))
        raise ConfigError(issue)
    recorded, file = read_records(run / RECORD_NAME).get(step), folder / CONFIG_NAME
    # A later start may have changed the mesh, or the steps and with them the learning rates.
    text = tomli_w.dumps(stored.config) if recorded is None else recorded.start["config"]
    file.write_text(text, encoding="utf-8")
    config = original = load_config([str(file)]).config
    if not 1 <= step <= config.training.steps:
        text = f"the run has steps 1 to {config.training.steps}"
        raise ConfigError(ConfigIssue("STEP", text, "name one of these", step))
    checkpoint = newest_before(run, step, config, stored)
    config = _with_start(config, run, checkpoint)
    if mesh is None:
        mesh = _mesh_of(checkpoint or stored.newest) if recorded is None else recorded.start["mesh"]
    config = quiet(on_mesh(config, mesh or degrees_of(config)), step)
    config = changed_config(config, job={"custom_import": ()})
    file.write_text(config_toml_text(config), encoding="utf-8")
    config = load_config([str(file), *settings]).config
    modules = original.job.custom_import
    if set(modules) - set(config.job.custom_import):
        text = "the run imported modules, and a stored config executes nothing"
        fix = f"if you trust them, add --job.custom_import={','.join(modules)}"
        raise ConfigError(ConfigIssue("job.custom_import", text, fix, list(modules)))
    config = changed_config(config, job={"dump_folder": str(folder)})
    file.write_text(config_toml_text(config), encoding="utf-8")
    return Prepared(original, config, file, 0 if checkpoint is None else checkpoint.step)


def launch(prepared: Prepared) -> int:
    """Run it on this machine, with its output on stderr; return the exit status.

    torchrun turns every failure into 1, so it is the one in the status of the folder.
    """
    code = run_words(words_of(prepared))
    try:
        status = json.loads((prepared.file.parent / STATUS_NAME).read_text(encoding="utf-8"))
        return int(status["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        return code or FAILED


def words_of(prepared: Prepared, python: str = sys.executable) -> list[str]:
    """Return the command line that runs it."""
    words = [python]
    if prepared.world_size > 1:
        words += ["-m", "torch.distributed.run", f"--nproc_per_node={prepared.world_size}"]
        words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [*words, "-m", "torchtitan.train", f"--job.config_file={prepared.file}"]


def run_words(words: Sequence[str], log: Path | None = None) -> int:
    """Run a command line, with its output in `log`, or on stderr; return its exit status.

    Whatever stops this process ends that one first, with the ranks that it has started.
    """
    place = nullcontext(sys.stderr) if log is None else log.open("wb")
    with place as output, subprocess.Popen(words, stdout=output, stderr=output) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def newest_before(run: Path, step: int, config: JobConfig, stored: StoredRun) -> Manifest | None:
    """Return the newest checkpoint of the run before `step` to continue from; None without one.

    Names and sizes are checked; contents are when it is loaded.
    """
    if not config.checkpoint.enable:
        return None
    own = [
        found.manifest
        for found in inspect_steps(run / config.checkpoint.folder)
        if found.manifest is not None
        and found.step < step
        and found.manifest.run_id == stored.status.get("run_id", found.manifest.run_id)
        and (found.step == 0 or not found.manifest.model_only)
    ]
    return own[-1] if own else None


def degrees_of(config: JobConfig) -> dict[str, int]:
    """Return the degrees of a config by axis; those that it leaves open are 1."""
    section = config.parallelism
    return {axis: max(1, getattr(section, key)) for axis, key in DEGREES.items()}


def _mesh_of(manifest: Manifest | None) -> dict[str, int] | None:
    """Return the mesh that saved a checkpoint."""
    mesh: dict[str, int] | None = None if manifest is None else manifest.info.get("mesh")
    return mesh


def _with_start(config: JobConfig, run: Path, checkpoint: Manifest | None) -> JobConfig:
    """Return the config of a run that starts from a checkpoint; else where the run started."""
    keys: dict[str, Any] = {}
    if checkpoint is not None:
        keys["initial_load_path"] = str(run / config.checkpoint.folder / step_name(checkpoint.step))
        keys["initial_load_model_only"] = checkpoint.model_only
        keys["exclude_from_loading"] = ()
    given = config.model.tokenizer_path
    copied = None if Path(given).exists() else copied_tokenizer(run, given)
    model = {} if copied is None else {"tokenizer_path": copied}
    return changed_config(config, checkpoint=keys, model=model)


def on_mesh(config: JobConfig, mesh: Mapping[str, int]) -> JobConfig:
    """Return the config on a mesh, with microbatches that divide a rank's share of a step."""
    before, degrees = degrees_of(config), {axis: mesh.get(axis, 1) for axis in DEGREES}
    section = {key: degrees[axis] for axis, key in DEGREES.items()}
    if degrees["pp"] == 1 and before["pp"] > 1:
        defaults = type(config.parallelism)()
        names = [name for name in type(defaults).model_fields if _is_of_pipelines(name)]
        section |= {name: getattr(defaults, name) for name in names if name not in section}
    training = config.training
    share, rest = divmod(training.global_batch_size, degrees["dp_replicate"] * degrees["dp_shard"])
    size = training.local_batch_size if rest else math.gcd(training.local_batch_size, share)
    return changed_config(config, parallelism=section, training={"local_batch_size": size})


def _is_of_pipelines(name: str) -> bool:
    return name.startswith("pipeline_parallel") or name == "module_fqns_per_model_part"


def quiet(config: JobConfig, step: int) -> JobConfig:
    """Return a config that ends with `step` on the same schedule, and only trains and logs."""
    steps, every = config.lr_scheduler.length(config.training.steps), config.debug.record
    config = changed_config(
        config,
        job={"print_config": False},
        training={"steps": step, "max_seconds": None},
        data={"ledger": True},
        optimizer={"early_step_in_backward": False},
        lr_scheduler={"total_steps": steps},
        checkpoint={
            "load_only": config.checkpoint.enable,
            "load_step": -1,
            "allow_rewind": False,
            "create_seed_checkpoint": False,
            "remote_folder": None,
            "last_save_model_only": False,
            "last_save_in_hf": False,
            "export_dtype": "float32",
        },
        debug={
            "record": every if every and step % every == 0 else step,
            "record_tensors": None,
        },
    )
    others = {
        "validation": Validation(),
        "evaluation": Evaluation(),
        "metrics": Metrics(log_freq=1),
        "sinks": {},
        "profiling": Profiling(),
    }
    return config.model_copy(update=others)
