"""The check that all processes of a run train with the same config."""

from typing import Any

from torchtitan.checkpoint.config_diff import flatten
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.fields import known_keys
from torchtitan.distributed.context import DistributedContext

_OF_A_MACHINE = ("job.", "profiling.", "debug.threads")
_PATHS = ("path", "folder", "file")


def require_same_config(config: JobConfig, world: DistributedContext) -> None:
    """Raise ConfigError on every rank if one has other settings than rank 0; all ranks call it.

    Machines may have read other files: a config, or its base, that was copied to each. Paths may
    differ, as what they lead to is compared by content.
    """
    mine = _settings(config)
    first = world.broadcast_json(mine if world.is_main else None)
    differing = [key for key in {**first, **mine} if first.get(key) != mine.get(key)]
    for rank, keys in enumerate(world.gather_json(differing)):
        if keys:
            problem = f"differs between ranks 0 and {rank}"
            fix = "give every process the same files and the same command line"
            raise ConfigError([ConfigIssue(key, problem, fix) for key in keys])


def _settings(config: JobConfig) -> dict[str, Any]:
    tables = {key.name for key in known_keys().values() if key.kind == "tables"}
    return {
        key: value
        for key, value in flatten(config.model_dump(mode="json")).items()
        if not key.startswith(_OF_A_MACHINE) and not key.endswith(_PATHS) and key not in tables
    }
