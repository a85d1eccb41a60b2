"""TorchTitan's TOMLs of three releases, and its flags, in today's keys.

Each source, the file and the command line, is translated by itself (`translate`), so that the
command line wins over the file whichever names either uses. Keys that depend on other keys wait
until both are merged (`settle`). Every translated key gives one notice; a key that switches on a
feature that does not exist gives an issue. The tables are in `keys.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torchtitan.config.compat import keys as tables
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import Key, free_table_of, known_keys, known_sections
from torchtitan.config.toml_text import toml_value

HANDLERS = "model.handlers"
MICROBATCH_SIZE = "parallelism.pipeline_parallel_microbatch_size"


@dataclass
class Translated:
    """One source's older keys: their values today, with notices and issues."""

    dashes: str = ""
    """The start of the keys as the user wrote them."""
    values: dict[str, Any] = field(default_factory=dict)
    """By today's dotted names."""
    pending: dict[str, Any] = field(default_factory=dict)
    """By their old names: those that `settle` decides about."""
    names: dict[str, str] = field(default_factory=dict)
    """The name that was written, by the one of today."""
    notices: dict[str, str] = field(default_factory=dict)
    """By the name that was written."""
    problems: list[ConfigIssue] = field(default_factory=list)


@cache
def old_defaults() -> dict[str, Any]:
    """Return every key of the tables with the default it had."""
    defaults: dict[str, Any] = {tables.CUSTOM_IMPORT: "", tables.CONVERTERS: []}
    defaults |= dict.fromkeys(tables.HANDLER_SWITCHES, False)
    defaults |= tables.HANDLER_SETTINGS | tables.BY_OTHER_KEYS
    defaults |= {name: converted.default for name, converted in tables.CONVERTED.items()}
    defaults |= {name: default for name, (default, _) in tables.IGNORED.items()}
    for feature in tables.NOT_BUILT:
        defaults |= {name: off[0] for name, off in feature.switches.items()}
        defaults |= feature.settings
    for name, today in tables.RENAMED.items():
        key = known_keys().get(today)
        defaults[name] = key.default if key else defaults[today]
    return defaults


def is_old_key(name: str) -> bool:
    """Return whether a dotted name is one of TorchTitan's that no section has today."""
    return name in old_defaults() and name not in known_keys()


def is_old_section(name: str) -> bool:
    """Return whether a table of TorchTitan's is no section today."""
    return name not in known_sections() and any(
        key.startswith(name + ".") for key in old_defaults()
    )


def is_old(name: str, value: Any) -> bool:
    """Return whether the key, or the value of today's key, has to be translated."""
    known_values = {*tables.OLD_VALUES, *tables.NOT_BUILT_VALUES}
    return is_old_key(name) or (isinstance(value, str) and (name, value) in known_values)


def today_name(name: str) -> str:
    """Return the key to write instead of an old one; the old one itself if there is none."""
    if name in tables.HANDLER_SWITCHES or name == tables.CONVERTERS:
        return HANDLERS
    if name == tables.MICROBATCHES:
        return MICROBATCH_SIZE
    if name == tables.CUSTOM_IMPORT:
        return "job.custom_import"
    if name in tables.HANDLER_SETTINGS:
        table = max((head for head in tables.HANDLER_TABLES if name.startswith(head)), key=len)
        return tables.HANDLER_TABLES[table] + name.removeprefix(table)
    if name in tables.CONVERTED:
        return tables.CONVERTED[name].name
    return tables.RENAMED.get(name, name)


def old_key(name: str) -> Key | None:
    """Return how an old key is written on the command line; None if the name is none."""
    if not is_old_key(name):
        return None
    key = known_keys().get(today_name(name))
    if key and (name in tables.RENAMED or name == tables.CONVERTERS):
        return replace(key, name=name, optional=True)
    default = old_defaults()[name]
    kinds = {bool: "bool", int: "int", float: "float", list: "strings"}
    kind: Any = "int" if name in tables.INTEGERS_OR_NONE else kinds.get(type(default), "str")
    return Key(name, kind, "", default, optional=True)


def take_old(table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a TOML table without its old keys, and these by dotted name.

    Tables that held old keys alone are gone, too.
    """
    old: dict[str, Any] = {}
    return _take_old(table, "", old), old


def _take_old(table: dict[str, Any], prefix: str, old: dict[str, Any]) -> dict[str, Any]:
    rest: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if "." in key:  # quoted: not the name it looks like
            rest[key] = value
        elif is_old(name, value):
            old[name] = value
        elif isinstance(value, dict) and not free_table_of(f"{name}."):
            inner = _take_old(value, name + ".", old)
            if inner or not is_old_section(name):
                rest[key] = inner
        else:
            rest[key] = value
    return rest


def translate(old: Mapping[str, Any], today: Collection[str], dashes: str = "") -> Translated:
    """Return `old` in today's keys. `today`: the keys of the same source that are today's."""
    result = Translated(dashes)
    for name, value in old.items():
        if value is None:  # `None` on the command line: as if it were not there
            continue
        target = today_name(name)
        other = target if target in today and target != name else None
        if name not in tables.HANDLER_SWITCHES:
            other = other or result.names.get(target)
        if other:
            text = f"is {target} today, and `{dashes}{other}` is set too"
            fix = f"keep `{dashes}{target}` alone"
            result.problems.append(ConfigIssue(dashes + name, text, fix, value))
        else:
            _translate_one(name, value, target, result)
    return result


def _translate_one(name: str, value: Any, target: str, result: Translated) -> None:
    shown, today = result.dashes + name, today_value(name, value)
    if name in tables.HANDLER_SWITCHES or name in tables.BY_OTHER_KEYS:
        result.pending[name] = value
    elif name in tables.IGNORED:
        reason = tables.IGNORED[name][1]
        if reason and value:
            result.notices[name] = f"{shown} is not needed: {reason}"
    elif isinstance(value, str) and (name, value) in tables.NOT_BUILT_VALUES:
        result.problems.append(_not_built(shown, value, tables.NOT_BUILT_VALUES[name, value]))
    elif name == tables.CONVERTERS and set(tables.MOE_CONVERTERS) & set(_texts(today)):
        result.problems.append(_not_built(shown, value, "a mixture of experts"))
    elif target in known_keys() or free_table_of(target):
        result.values[target] = today
        result.names[target] = name
        result.notices[name] = f"{shown} is {target} today"
        if target == name:
            result.notices[name] = f"{shown} = {toml_value(value)} is {toml_value(today)} today"
        elif name in tables.CONVERTED and today != value:
            change = f"{toml_value(value)} is {target} = {toml_value(today)}"
            result.notices[name] = f"{shown} = {change} today"
    else:
        for feature in tables.NOT_BUILT:
            off = feature.switches.get(target)
            if off is not None and not any(_same(item, today) for item in off):
                result.problems.append(_not_built(shown, value, feature.name, feature.instead))


def today_value(name: str, value: Any) -> Any:
    """Return the value that today's key has for an old one's."""
    if isinstance(value, str) and (name, value) in tables.OLD_VALUES:
        return tables.OLD_VALUES[name, value]
    if name == tables.CUSTOM_IMPORT and isinstance(value, str):
        return [value] if value else []
    if name == tables.CONVERTERS and isinstance(value, list):
        return [tables.CONVERTER_NAMES.get(str(item), item) for item in value]
    if name == tables.SPLIT_POINTS and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if name in tables.CONVERTED:
        for old, new in tables.CONVERTED[name].values.items():
            if _same(old, value):
                return new
    return value


def _not_built(shown: str, value: Any, feature: str, instead: str = "") -> ConfigIssue:
    text = f"this library does not have {feature} yet"
    return ConfigIssue(shown, text, instead or "remove it", value)


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


@dataclass
class Settled:
    """Issues and notices of `settle`."""

    problems: list[ConfigIssue] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    by_flags: list[str] = field(default_factory=list)
    """Today's keys that the command line changed."""


def settle(
    values: dict[str, Any], file: Translated, flags: Translated, flags_today: Collection[str]
) -> Settled:
    """Apply the pending keys to `values`, which file and command line were merged into.

    `flags_today` are the keys that the command line gave by today's names: they win over an old
    key of the file that means the same.
    """
    settled = Settled()
    for source in (file, flags):
        for name in (*tables.HANDLER_SWITCHES, *tables.BY_OTHER_KEYS):  # handlers in their order
            is_replaced = source is file and {name, today_name(name)} & set(flags_today)
            if name in source.pending and not is_replaced:
                _settle_one(values, name, source.pending[name], source.dashes, settled)
    _leave_out_unused(values, file, flags)
    settled.notices += [*file.notices.values(), *flags.notices.values()]
    return settled


def _settle_one(
    values: dict[str, Any], name: str, value: Any, dashes: str, settled: Settled
) -> None:
    shown, handlers, text, fix = dashes + name, _handlers(values), "", ""
    changed: tuple[str, Any] | None = None
    if name in tables.HANDLER_SWITCHES:
        handler = tables.HANDLER_SWITCHES[name]
        if type(value) is not bool:
            text, fix = "needs true or false", "write true or false"
        elif value and handler not in handlers:
            changed = HANDLERS, [*handlers, handler]
            settled.notices.append(f'{shown} is "{handler}" in {HANDLERS} today')
        elif not value and dashes and handler in handlers:
            changed = HANDLERS, [other for other in handlers if other != handler]
            settled.notices.append(f'{shown} = false is {HANDLERS} without "{handler}" today')
    elif name == tables.MICROBATCHES:
        local = _get(values, "training.local_batch_size")
        if type(local) is not int or _get(values, "parallelism.pipeline_parallel_degree") == 1:
            return
        if type(value) is not int or value < 1 or local % value:
            text = f"training.local_batch_size = {local} cannot be cut into {value} microbatches"
            fix = f"write {MICROBATCH_SIZE} instead, the sequences of one"
        else:
            changed = MICROBATCH_SIZE, local // value
            settled.notices.append(f"{shown} = {value} is {MICROBATCH_SIZE} = {changed[1]} today")
    elif name == tables.TOTAL_STEPS:
        if value != _get(values, "training.steps"):
            text = "this library does not have a learning rate for another number of steps yet"
            fix = "set training.steps to it, which the learning rate follows"
    elif "compile" in handlers and not (isinstance(value, list) and "model" in value):
        text = "the handler compile compiles the blocks of the model"
        fix = 'list "model" in it, or switch compilation off'
    if text:
        settled.problems.append(ConfigIssue(shown, text, fix, value))
    if changed:
        section, _, key = changed[0].rpartition(".")
        values.setdefault(section, {})[key] = changed[1]
        settled.by_flags += [changed[0]] * bool(dashes)


def _leave_out_unused(values: dict[str, Any], file: Translated, flags: Translated) -> None:
    """Take out the settings, written in old keys, of handlers that are not used."""
    settings, handlers = values.get("handlers", {}), _handlers(values)
    if not isinstance(settings, dict):
        return  # reported as a wrong type
    for source in (file, flags):
        for target, name in list(source.names.items()):
            section, handler, *_ = target.split(".")
            if section != "handlers" or handler in handlers:
                continue
            del source.notices[name], source.names[target]
            table = settings.get(handler)
            if isinstance(table, dict):
                table.pop(target.rpartition(".")[2], None)
            if table == {}:
                del settings[handler]


def _handlers(values: dict[str, Any]) -> list[str]:
    handlers = _get(values, HANDLERS)
    return list(handlers) if isinstance(handlers, list | tuple) else []


def _get(values: dict[str, Any], name: str) -> Any:
    """Return the merged value of a key, or its default."""
    section, _, key = name.rpartition(".")
    table = values.get(section, {})
    default = known_keys()[name].default
    return table.get(key, default) if isinstance(table, dict) else default
