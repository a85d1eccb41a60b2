"""Differences between a config and that of the run in the folder. No torch.

A config whose curve would differ from the stored run's is refused, with the differences. Keys that
may differ are listed in `MAY_DIFFER`, each with its reason; every other key counts.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.toml_file import tomllib

MAY_DIFFER: dict[str, str] = {
    "job.config_file": "a path",
    "job.dump_folder": "a path; the folder itself identifies the run",
    "job.description": "logging",
    "job.print_config": "logging",
    "job.custom_import": "where code comes from; other keys name what the run uses of it",
    "job.new_run": "what to do with the old run, not what to train",
    "job.device": "the same numbers up to rounding on every device",
    "model.tokenizer_path": "a path; a checkpoint knows its tokenizer by content",
    "training.dataset_path": "a path; a checkpoint knows its data by content",
    "data.sources.path": "like training.dataset_path, for every source",
    "training.local_batch_size": "how a step is cut; global_batch_size says how large it is",
    "training.loss_chunks": "memory; the same sums up to rounding",
    "training.enable_cpu_offload": "memory; the same numbers",
    "training.max_seconds": "when a start stops",
    "training.on_non_finite": "only steps still to come; a run that such a step ended may continue",
    "training.on_loss_spike": "like training.on_non_finite",
    "training.loss_spike_*": "like training.on_non_finite",
    "training.max_skipped_steps": "like training.on_non_finite",
    "training.gc_freq": "speed",
    "training.gc_debug": "logging",
    "training.dataloader.*": "speed; any number of workers reads the same data",
    "optimizer.implementation": "speed; the same update up to rounding",
    "optimizer.early_step_in_backward": "memory; the same update",
    "parallelism.*": "the mesh",
    "activation_checkpoint.*": "memory; recomputes the same values",
    "handlers.compile.*": "speed; the same numbers up to rounding",
    "checkpoint.initial_load_path": "a path; done once, before the run has checkpoints of its own",
    "checkpoint.initial_load_model_only": "like checkpoint.initial_load_path",
    "checkpoint.exclude_from_loading": "like checkpoint.initial_load_path",
    "checkpoint.create_seed_checkpoint": "the weights that the run would start from without it",
    "checkpoint.async_mode": "speed; the same files",
    "checkpoint.*": "when to save and what to keep",
    "loss.args.reference_path": "a path; a checkpoint knows its reference by content",
    "loss.args.reference_cache": "the same values, computed before the first step",
    "loss.args.teacher_path": "like loss.args.reference_path",
    "validation.*": "what is measured, not what is trained",
    "evaluation.*": "like validation",
    "metrics.*": "logging",
    "profiling.*": "logging",
    "comm.*": "time limits and debugging",
    "debug.deterministic": "which of several correct algorithms runs",
    "debug.deterministic_warn_only": "like debug.deterministic",
    "debug.record": "logging",
    "debug.cpu_allocator": "speed",
    "debug.record_tensors": "what is written down, not what is trained",
    "debug.threads": "speed",
    "data.on_bad_row": "only rows still to come; a run that met a bad row may continue",
    "data.max_bad_rows": "like data.on_bad_row",
    "data.max_document_mib": "like data.on_bad_row",
    "data.read_retries": "patience with the disk, not the data",
    "data.restart": "where to continue in other data, which are compared by content",
    "data.add_bos": "a checkpoint knows its tokenizer, including these tokens",
    "data.add_eos": "like data.add_bos",
    "data.chat_template": "compared by content, with the data",
    "data.pad_to_multiple": "speed; the same samples",
    "data.skip": "only steps still to come; their data may be left out once they prove bad",
    "data.ledger": "logging",
}
"""Keys (globs) that may differ from the run in the folder, and why."""

MUST_NOT = ("checkpoint.folder",)
"""Exceptions to `MAY_DIFFER`: in a folder of another name the checkpoints would not be found."""

NOTICED = (
    "model.tokenizer_path",
    "training.dataset_path",
    "data.sources.path",
    "training.on_non_finite",
    "training.on_loss_spike",
    "data.on_bad_row",
    "data.max_bad_rows",
    "data.max_document_mib",
    "data.skip",
)
"""Keys of `MAY_DIFFER` whose change is logged."""

_FREE_HANDLERS = {"compile"}
RESOLVED = ("training.global_batch_size", "data.lanes", "lr_scheduler.warmup_steps")
"""Keys that a config may leave open, unset or -1: the first start of a run sets them."""
_STEPS = "training.steps"
_TOTAL_STEPS = "lr_scheduler.total_steps"
_EPOCHS = "data.epochs"
_SOURCE_PATHS = "data.sources.path"
_MISSING = object()


def read_stored_config(path: Path) -> dict[str, Any] | None:
    """Return the config that a run saved in its folder; None if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as `section.key` -> value, without unset (None) values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value is not None:
            flat[prefix + key] = _plain(value)
    return flat


def stored_value(stored: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key in a stored config; None if unset."""
    return flatten(stored).get(key)


def compare(stored: Mapping[str, Any], config: JobConfig) -> tuple[list[ConfigIssue], list[str]]:
    """Return the differences that make `config` another run, and notices about permitted ones.

    A key that is missing in the stored config, which may be an older release's, has its default.
    `training.steps`, `total_steps` and `data.epochs` may grow, and an open `global_batch_size`,
    `lanes` or `warmup_steps` takes the stored value.
    """
    defaults = flatten(JobConfig().model_dump())
    old = {**defaults, **flatten(stored)}
    new = flatten(config.model_dump())
    for side in (old, new):
        handlers = side.get("model.handlers", [])
        side["model.handlers"] = [name for name in handlers if name not in _FREE_HANDLERS]
        sources = side.get("data.sources", [])
        side["data.sources"] = [{k: v for k, v in t.items() if k != "path"} for t in sources]
        side[_SOURCE_PATHS] = [table.get("path") for table in sources]
    if _TOTAL_STEPS in {*old, *new}:
        for side in (old, new):
            side.setdefault(_TOTAL_STEPS, side[_STEPS])
    problems, notices = [], []
    for key in sorted({*old, *new}):
        before, now = old.get(key, _MISSING), new.get(key, _MISSING)
        if before == now:
            continue
        if key == _STEPS and now > before:
            text = "" if _TOTAL_STEPS in new else "; so does the schedule of the learning rate"
            notices.append(f"training.steps grows from {before} to {now}{text}.")
        elif key == _TOTAL_STEPS and now > before:
            notices.append(f"The schedule of the learning rate grows from {before} to {now} steps.")
        elif key == _EPOCHS and epochs_grow(old.get(key), new.get(key)):
            text = f"{key} grows from {before} to {_show(now)}: each data lane continues where it"
            notices.append(f"{text} stopped, or with the next epoch if its data had ended.")
        elif key in RESOLVED and now in (-1, _MISSING):
            continue
        elif reason_to_differ(key) is None:
            problems.append(_problem(key, before, now))
        elif key in NOTICED:
            notices.append(f"{key} was {_show(before)} and is {_show(now)} from here on.")
    return problems, notices


def epochs_grow(before: Any, now: int | None) -> bool:
    """Return whether `now` epochs are more than `before`; None is without end."""
    return isinstance(before, int) and (now is None or now > before)


def reason_to_differ(key: str) -> str | None:
    """Return the reason that a key may differ from the run in the folder; None if it may not."""
    patterns = () if key in MUST_NOT else MAY_DIFFER
    return next((MAY_DIFFER[glob] for glob in patterns if fnmatchcase(key, glob)), None)


def _problem(key: str, before: Any, now: Any) -> ConfigIssue:
    back = f"set it back to {_show(before)}" if before is not _MISSING else "leave it unset"
    value = None if now is _MISSING else now
    fix = f"{back}; {WAYS_OUT}"
    return ConfigIssue(key, f"is {_show(before)} in the run that this folder holds", fix, value)


WAYS_OUT = (
    "or train in another --job.dump_folder; or start anew here with --job.new_run, which moves the"
    " old run aside"
)


def _show(value: Any) -> str:
    return "unset" if value is _MISSING else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
