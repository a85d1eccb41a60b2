"""A config as TOML text that loads to the same config."""

from typing import Any

import tomli_w

from torchtitan.config.job_config import JobConfig


def dump_toml(config: JobConfig) -> str:
    """The whole config, defaults included. TOML has no null: unset keys are left out."""
    return tomli_w.dumps(_plain(config.model_dump(exclude_none=True)))


def config_toml_text(config: JobConfig) -> str:
    """`dump_toml` with a first comment, for the run folder."""
    comment = "# Every setting of this run, as it was resolved. It can be trained from like any other."
    return f"{comment}\n\n{dump_toml(config)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
