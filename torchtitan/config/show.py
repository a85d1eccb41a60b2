"""Show a resolved config as TOML, with the origin of every value."""

from typing import Any

from torchtitan.config.fields import free_table_of, known_keys, known_sections
from torchtitan.config.load import DEFAULT, LoadedConfig
from torchtitan.config.toml_text import toml_value


def show_config(loaded: LoadedConfig) -> str:
    """Return the config as TOML that loads to itself; unset keys are comments."""
    values = loaded.config.model_dump()
    blocks = []
    for section in known_sections():
        table: Any = values
        for part in section.split("."):
            table = table[part]
        lines = _free_lines(section, table) if section in known_keys() else _lines(section, table)
        rows = [(line, loaded.origins.get(name, DEFAULT)) for name, line in lines]
        if rows or section not in known_keys():
            blocks.append(f"[{section}]\n" + _aligned(rows))
    return "\n\n".join(_head(loaded) + blocks)


def _head(loaded: LoadedConfig) -> list[str]:
    """Return a comment with the chain of files, where there are several."""
    names = [str(file.path) for file in reversed(loaded.files)]
    return [f"# {', based on '.join(names)}"] if len(names) > 1 else []


def _lines(section: str, table: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for key in known_keys().values():
        if key.section == section and key.kind != "table":
            value = table[key.last_name]
            text = f"{key.last_name} = {toml_value(_without_none(value))}"
            lines.append((key.name, f"# {text}" if value is None else text))
    return lines


def _free_lines(section: str, table: dict[str, Any]) -> list[tuple[str, str]]:
    """Return free-form tables as dotted keys, so that each value keeps its origin."""
    lines = []
    for key, value in table.items():
        name = f"{section}.{key}"
        if isinstance(value, dict) and free_table_of(name) and value:
            inner = _free_lines(name, value)
            lines += [(inner_name, f"{key}.{line}") for inner_name, line in inner]
        else:
            lines.append((name, f"{key} = {toml_value(value)}"))
    return lines


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _aligned(rows: list[tuple[str, str]]) -> str:
    width = min(48, max((len(line) for line, _ in rows), default=0))
    return "\n".join(f"{line:<{width}}  # {origin}" for line, origin in rows)
