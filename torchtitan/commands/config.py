"""`torchtitan config show | diff | copy | convert | schema | docs`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import PydanticUserError

from torchtitan.commands.config_diff import print_difference
from torchtitan.config.compat.translate import take_old
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import BASE, TOP_KEYS, UNSET, known_sections, unexpanded_paths
from torchtitan.config.load import LoadedConfig, load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.reference import reference_page
from torchtitan.config.schema import JobConfig, LRScheduler, Section
from torchtitan.config.shipped import CLONE, FOLDER, shipped_configs
from torchtitan.config.show import show_config
from torchtitan.config.suggest import did_you_mean
from torchtitan.training.pretrained_config import with_pretrained


def run(options: argparse.Namespace) -> int:
    """Do what `options.action` names; exit status 0."""
    if options.action == "show":
        loaded = with_pretrained(load_config(options.settings), with_weights=False)
        print_notices(loaded)
        for issue in unexpanded_paths(loaded.config):
            print(f"warning: {issue}", file=sys.stderr)
        print(show_config(loaded))
    elif options.action == "copy":
        _copy(options.name, options.file)
    elif options.action == "diff":
        print_difference(options.first, options.second)
    elif options.action == "convert":
        _convert(options.old, options.new)
    elif options.action == "schema":
        print(json.dumps(json_schema(), indent=2))
    else:
        print(reference(), end="")
    return 0


def print_notices(loaded: LoadedConfig) -> None:
    """Print, to stderr, what was read differently from how it is written."""
    for notice in loaded.notices:
        print(f"notice: {notice}", file=sys.stderr)


def description(path: Path) -> str:
    """Return what a shipped TOML is for: its first comment up to what a dry run counts."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^# (for .*(?:\n# [^A-Z\s].*)*)", text, re.MULTILINE)
    comment = found[1].replace("\n# ", " ") if found else ""
    return re.split(r"\.\s+(?=[A-Z])|; a dry run", comment)[0]


def _copy(name: str, file: str) -> None:
    """Write a copy of the shipped TOML `name` to `file`, which must not exist."""
    known = shipped_configs()
    if not known:
        problem = f"{CLONE / FOLDER} does not exist, and the installation lists no configs"
        raise ConfigError(
            ConfigIssue("config copy", problem, "install from a clone: pip install .")
        )
    stem = name.removesuffix(".toml")
    if stem not in known:
        fix = did_you_mean(stem, known)
        raise ConfigError(ConfigIssue(f"config copy {name}", "is not a shipped config", fix))
    target = Path(expand_path(file))
    target = target / f"{stem}.toml" if target.is_dir() else target
    text = known[stem].read_text(encoding="utf-8")
    # The comments say how to start it, with the name of the file.
    _write(target, text.replace(f"{FOLDER}/{stem}.toml", str(target)))
    start = f"torchtitan train {target}"
    if (CLONE / "run_llama_train.sh").is_file():
        start = f"CONFIG_FILE={target} ./run_llama_train.sh"
    print(f"wrote {target}; start it with\n  {start}")


def _convert(old: str, new: str | None) -> None:
    """Write the TOML `old`, of any release, with today's keys: to the file `new`, or to stdout."""
    loaded = load_config(["--job.config_file", old])
    print_notices(loaded)
    path = loaded.files[-1].path
    if dropped := _dropped(loaded):
        print(f"notice: left out, as nothing uses them: {', '.join(dropped)}", file=sys.stderr)
    if new is None:
        print(_today(loaded, path.parent), end="")
    else:
        target = Path(expand_path(new))
        target = target / path.name if target.is_dir() else target
        _write(target, _today(loaded, target.parent))
        print(f"wrote {target}; comments were not carried over")


def _dropped(loaded: LoadedConfig) -> list[str]:
    """Return the older keys of the file that say nothing today, such as those of what is off."""
    file = loaded.files[-1]
    prefix = f"{file.path}: " if len(loaded.files) > 1 else ""
    noted = {text.removeprefix(prefix).partition(" ")[0] for text in loaded.notices}
    return [name for name in take_old(file.table)[1] if name not in noted]


def _today(loaded: LoadedConfig, folder: Path) -> str:
    """Return the keys that the file sets, in the order of the sections, for a file in `folder`."""
    given = {name: table for name, table in loaded.own.items() if table}
    job = {key: value for key, value in given.get("job", {}).items() if key != "config_file"}
    given["job"] = job
    ordered = {name: given[name] for name in known_sections() if given.get(name)}
    file = loaded.files[-1]
    top: dict[str, Any] = {} if file.base is None else {BASE: _base_from(loaded, folder)}
    top |= {UNSET: list(file.unset)} if file.unset else {}
    comment = f"# {file.path.name} with today's keys, by `torchtitan config convert`; its comments"
    return f"{comment} are\n# not carried over\n\n{tomli_w.dumps({**top, **ordered})}"


def _base_from(loaded: LoadedConfig, folder: Path) -> str:
    """Return the base as a file in `folder` has to name it."""
    base, file = loaded.files[-2:]
    assert file.base is not None
    is_shipped = base.path == shipped_configs().get(file.base)
    here, there = folder.resolve(), file.path.parent.resolve()
    if is_shipped or here == there or Path(expand_path(file.base)).is_absolute():
        return file.base
    return os.path.relpath(base.path.resolve(), here)


def _write(path: Path, text: str) -> None:
    """Write a file that must not exist yet."""
    file = None
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        fix = "choose another name, or remove that file first"
        raise ConfigError(ConfigIssue(str(path), "exists already", fix)) from None
    except OSError as error:
        if file is not None:  # leave no partial file
            path.unlink(missing_ok=True)
        fix = "write to a folder that exists and is writable"
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError(ConfigIssue(str(path), problem, fix)) from None


def reference() -> str:
    """Return the text of docs/reference/settings.md."""
    return reference_page({table: _own(models) for table, models in free_tables().items()})


def _own(models: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    """Drop what installed packages add: the page is about this library."""
    return {
        name: model for name, model in models.items() if model.__module__.startswith("torchtitan.")
    }


def json_schema() -> dict[str, object]:
    """Return the JSON schema of the TOML file, which editors with TOML support read."""
    schema = JobConfig.model_json_schema(mode="validation")
    for table, models in named_tables().items():
        settings = {}
        for name, model in models.items():
            settings[name], inner = _schema_of(model, f"{table}.{name}")
            schema["$defs"].update(inner)
        schema["properties"][table]["properties"] = settings
    text: dict[str, Any] = {"type": "string"}
    kinds: dict[str, dict[str, Any]] = {BASE: text, UNSET: {"type": "array", "items": text}}
    top = {name: {**kinds[name], "description": key.doc} for name, key in TOP_KEYS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {**top, **schema["properties"]},
        "title": "torchtitan run",
    }


def _schema_of(model: type[Section], prefix: str) -> tuple[dict[str, object], dict[str, object]]:
    """Return the schema of a table and its definitions, whose names begin with `prefix`.

    Two settings may have inner classes of the same name.
    """
    template = f"#/$defs/{prefix}.{{model}}"
    try:
        schema = model.model_json_schema(mode="validation", ref_template=template)
    except PydanticUserError:
        return {"type": "object"}, {}  # a custom type that JSON cannot describe
    inner = {f"{prefix}.{name}": value for name, value in schema.pop("$defs", {}).items()}
    return schema, inner


def named_tables() -> dict[str, dict[str, type[Section]]]:
    """Return the settings of `[handlers.NAME]` and `[sinks.NAME]` by table and name."""
    from torchtitan.handlers.registry import HANDLERS
    from torchtitan.metrics.sinks import SINKS

    return {
        "handlers": {name: entry.settings for name, entry in HANDLERS.entries().items()},
        "sinks": {name: entry.settings for name, entry in SINKS.entries().items()},
    }


def free_tables() -> dict[str, dict[str, type[Section]]]:
    """Return the settings of all free-form tables, by table and by the name that chooses them."""
    from torchtitan.loss.registry import LOSSES
    from torchtitan.models.registry import families
    from torchtitan.optim.lr_scheduler import SCHEDULES
    from torchtitan.optim.registry import OPTIMIZERS

    optimizers = {name: entry.settings for name, entry in OPTIMIZERS.entries().items()}
    schedules = {name: entry.settings for name, entry in SCHEDULES.entries().items()}
    return {
        "model.args": {name: family.args_type for name, family in families().items()},
        "loss.args": {name: entry.settings for name, entry in LOSSES.entries().items()},
        # An optimizer without settings needs no table.
        "optimizer.args": {name: s for name, s in optimizers.items() if s.model_fields},
        "lr_scheduler.args": {n: s for n, s in schedules.items() if s is not LRScheduler},
        **named_tables(),
    }
