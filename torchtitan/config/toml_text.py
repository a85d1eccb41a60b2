"""Write a config as TOML text that loads to the same config."""

from typing import Any

import tomli_w
from pydantic import BaseModel

from torchtitan.config.schema import JobConfig
from torchtitan.utils.redaction import redact_tree


def dump_toml(config: JobConfig, redacted: bool = False) -> str:
    """Return the whole config, defaults included, without unset keys; `redacted`: no secrets."""
    values = _plain(config.model_dump(exclude_none=True))
    return tomli_w.dumps(redact_tree(values) if redacted else values)


def config_toml_text(config: JobConfig) -> str:
    """Return `dump_toml` with a first comment, for the run folder."""
    comment = "# Every setting of this run, as it was resolved. Train from it like from any other."
    return f"{comment}\n\n{dump_toml(config)}"


def toml_value(value: Any) -> str:
    """Return one value as TOML on one line; None as `unset`."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        items = [f"{_toml_key(key)} = {toml_value(item)}" for key, item in value.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if value is None:
        return "unset"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def _toml_key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
