"""Complete a config from the checkpoint that the run starts from. No torch.

`model.flavor = "from_checkpoint"` becomes the checkpoint's hyper-parameters in `model.args`, an
unset `model.tokenizer_path` its tokenizer, and `hf://owner/name` a folder. The result is stored
with the run, from where a resume takes it: the checkpoint is not needed again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.decision import starts_anew
from torchtitan.checkpoint.stored_run import TOKENIZER_NAME, StoredRun
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.load import LoadedConfig
from torchtitan.config.schema import Model
from torchtitan.models.family import FROM_CHECKPOINT
from torchtitan.models.registry import get_family
from torchtitan.utils.remote import is_remote
from torchtitan.weights import remote
from torchtitan.weights.description import (
    KEY,
    ModelDescription,
    describe_model,
    same_architecture,
    stored_model,
)
from torchtitan.weights.recognise import kind_of
from torchtitan.weights.tokenizer_files import VOCABULARIES, tokenizer_folder

_TOKENIZER = "model.tokenizer_path"


@dataclass(frozen=True)
class _Found:
    """Fields of `[model]` that are taken over, and their origins."""

    model: Mapping[str, Any]
    origins: Mapping[str, str]
    notices: tuple[str, ...] = ()


def with_pretrained(loaded: LoadedConfig, with_weights: bool = True) -> LoadedConfig:
    """Return the config with everything that it takes from the checkpoint it starts from.

    Every rank calls it. Without `with_weights` only the small files of a repository are downloaded,
    and `checkpoint.initial_load_path` stays as it is. Raises `ConfigError`.
    """
    config = loaded.config
    given = config.checkpoint.initial_load_path
    if given is None and config.model.flavor != FROM_CHECKPOINT:
        return loaded
    found = _of_run(config)
    if found is None and given is not None:
        is_elsewhere = is_remote(given)
        path = remote.download(given, with_weights) if is_elsewhere else Path(given)
        found = _of_checkpoint(config.model, path)
        if is_elsewhere and with_weights:
            update = {"initial_load_path": str(path)}
            checkpoint = config.checkpoint.model_copy(update=update)
            config = config.model_copy(update={"checkpoint": checkpoint})
            found = replace(found, origins={**found.origins, KEY: given})
    if found is None:
        return loaded  # the check of the model says what is missing
    config = config.model_copy(update={"model": config.model.model_copy(update=found.model)})
    origins = {**loaded.origins, **found.origins}
    notices = (*loaded.notices, *found.notices)
    return replace(loaded, config=config, origins=origins, notices=notices)


def _of_run(config: JobConfig) -> _Found | None:
    """Return what the run in the folder has taken over; None if it has yet to begin."""
    path = Path(config.job.dump_folder)
    if starts_anew(config):
        return None
    try:
        run = StoredRun(path, config.checkpoint.folder)
        table = (run.config or {}).get("model") if run.good or run.ended else None
        stored = None if table is None else Model.model_validate(table)
    except (OSError, ValueError):  # reported by the check of the folder
        return None
    if stored is None:
        return None
    section, origin = config.model, f"the run in {config.job.dump_folder}"
    model: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if section.flavor == stored.flavor == FROM_CHECKPOINT:
        taken = {name: stored.args[name] for name in stored.args if name not in section.args}
        model = {"name": stored.name, "args": {**taken, **section.args}}
        origins = {f"model.args.{name}": origin for name in taken}
    if "tokenizer_path" not in section.model_fields_set:
        given = stored.tokenizer_path
        own = None if Path(given).exists() else copied_tokenizer(path, given)
        model["tokenizer_path"] = own or given
        origins[_TOKENIZER] = origin
    return _Found(model, origins)


def _of_checkpoint(section: Model, path: Path) -> _Found:
    """Return what a new run takes from the checkpoint at `path`."""
    model: dict[str, Any] = {}
    origins: dict[str, str] = {}
    notices: tuple[str, ...] = ()
    if section.flavor == FROM_CHECKPOINT:
        description = describe_model(path)
        args = dict(description.args)
        if "norm_type" in section.model_fields_set or args.get("norm_type") == section.norm_type:
            args.pop("norm_type", None)
        args = {name: value for name, value in args.items() if name not in section.args}
        model = {"name": _family_name(section, description), "args": {**args, **section.args}}
        origins = {f"model.args.{name}": description.source for name in args}
        origins["model.name"] = description.source
        notices = description.notices
    if "tokenizer_path" not in section.model_fields_set and path.exists():
        tokenizer = tokenizer_of(path)
        if tokenizer is not None:
            model["tokenizer_path"] = tokenizer
            origins[_TOKENIZER] = str(path)
    return _Found(model, origins, notices)


def _family_name(section: Model, description: ModelDescription) -> str:
    """Return the name of the family: the checkpoint's, or the user's if it computes the same."""
    if "name" not in section.model_fields_set:
        return description.family
    if same_architecture(get_family(section.name), get_family(description.family)):
        return section.name
    text = f"the model in {description.source} is {description.family}"
    fix = f'set "{description.family}", or leave it out'
    raise ConfigError(ConfigIssue("model.name", text, fix, section.name))


def tokenizer_of_step(path: Path) -> str | None:
    """Return the tokenizer of a step's run: its copy, with the chat template, or where it was."""
    section = stored_model(path)
    given = None if section is None else section.tokenizer_path
    return copied_tokenizer(path.resolve().parent.parent, given or "") or given


def copied_tokenizer(run: Path, given: str) -> str | None:
    """Return a run's copy of the tokenizer that it was `given`; None without one."""
    folder = run / TOKENIZER_NAME
    # A file may have any name, and others may lie beside it.
    if (file := folder / Path(given).name).is_file():
        return str(file)
    return None if tokenizer_folder(folder) is None else str(folder)


def tokenizer_of(path: Path) -> str | None:
    """Return the `model.tokenizer_path` that comes with a checkpoint; None to keep the default."""
    kind = kind_of(path)
    if kind == "step":
        return tokenizer_of_step(path)
    folder = tokenizer_folder(path)
    if folder is not None:
        return str(folder)
    if kind in (None, "dcp", "torch"):
        return None
    text = f"is unset, and {path} has no tokenizer; looked for {', '.join(VOCABULARIES)}"
    fix = "set it to the tokenizer that the model was trained with"
    raise ConfigError(ConfigIssue(_TOKENIZER, text, fix))
