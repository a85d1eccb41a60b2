"""TorchTitan's TOMLs of three releases, and its flags, in today's keys.

Each source, a file, its bases and the command line, is translated by itself (`translate`), so that
a later source wins over an earlier one whichever names either uses. Keys that depend on other keys
wait until all are merged (`settle`). Every translated key gives one notice; a key that switches on
a feature that does not exist gives an issue. The tables are in `keys.py`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchtitan.config.compat import keys as tables
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import Key, free_table_of, known_keys, known_sections
from torchtitan.config.toml_text import toml_value

_PENDING = (*tables.HANDLER_SWITCHES, *tables.BY_OTHER_KEYS)
"""Decided by `settle`, in this order."""


@dataclass
class Translated:
    """One source's older keys: their values today, with notices and issues."""

    dashes: str = ""
    """The start of the keys as the user wrote them."""
    today: frozenset[str] = frozenset()
    """Keys that the source gives by today's names."""
    overrides: bool = False
    """Another source comes before it: a switch that is false takes out what that one put in."""
    values: dict[str, Any] = field(default_factory=dict)
    """By today's dotted names."""
    pending: dict[str, Any] = field(default_factory=dict)
    """By their old names: those that `settle` decides about."""
    changed: list[str] = field(default_factory=list)
    """Today's keys that `settle` set."""
    names: dict[str, str] = field(default_factory=dict)
    """The name that was written, by the one of today."""
    notices: dict[str, str] = field(default_factory=dict)
    """By the name that was written."""
    issues: list[ConfigIssue] = field(default_factory=list)

    def note(self, name: str, text: str) -> None:
        """Add the notice of a key."""
        self.notices[name] = f"{self.dashes}{name} {text}"

    def leave_out(self, name: str) -> bool:
        """Drop the undecided keys that mean the key or table `name` of today; True if any does."""
        meant = [
            old for old in self.pending if f"{tables.TODAY.get(old, old)}.".startswith(f"{name}.")
        ]
        for old in meant:
            del self.pending[old]
        return bool(meant)

    def reject(self, name: str, problem: str, fix: str, value: Any) -> None:
        """Add the issue of a key."""
        self.issues.append(ConfigIssue(self.dashes + name, problem, fix, value))


def is_old_section(name: str) -> bool:
    """Return whether a table of TorchTitan's is no section today."""
    old = any(key.startswith(name + ".") for key in tables.OLD_KEYS)
    return old and name not in known_sections()


def is_old(name: str, value: Any) -> bool:
    """Return whether the key, or the value of today's key, has to be translated."""
    has_old_value = isinstance(value, str) and (name, value) in tables.OLD_VALUES
    return name in tables.OLD_KEYS or has_old_value


def old_key(name: str) -> Key | None:
    """Return how an old key is written on the command line; None if the name is none."""
    if name not in tables.OLD_KEYS:
        return None
    key = known_keys().get(tables.TODAY.get(name, name))
    if key and (name in tables.RENAMED or name == tables.CONVERTERS):
        return replace(key, name=name, optional=True)
    example = tables.EXAMPLES[tables.RENAMED.get(name, name)]
    kinds: dict[type, Any] = {bool: "bool", int: "int", float: "float", list: "strings"}
    return Key(name, kinds.get(type(example), "str"), "", example, optional=True)


def take_old(table: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a TOML table without its old keys, and these by dotted name.

    Tables that held old keys alone are gone, too.
    """
    rest: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if "." in key:  # quoted: not the name it looks like
            rest[key] = value
        elif is_old(name, value):
            old[name] = value
        elif isinstance(value, dict) and not free_table_of(f"{name}."):
            inner, old_inner = take_old(value, name + ".")
            old |= old_inner
            if inner or not is_old_section(name):
                rest[key] = inner
        else:
            rest[key] = value
    return rest, old


def translate(
    old: Mapping[str, Any], today: Collection[str], dashes: str = "", overrides: bool = False
) -> Translated:
    """Return `old` in today's keys. `today`: the keys of the same source that are today's."""
    result = Translated(dashes, frozenset(today), overrides)
    for name, value in old.items():
        if value is None:  # `None` on the command line: as if it were not there
            continue
        target = tables.TODAY.get(name, name)
        other = target if target in today and target != name else None
        if name not in tables.HANDLER_SWITCHES:
            other = other or result.names.get(target)
        if other:
            problem = f"is {target} today, and `{dashes}{other}` is set too"
            result.reject(name, problem, f"keep `{dashes}{target}` alone", value)
        elif name in _PENDING:
            result.pending[name] = value
        elif name in tables.REASONS and value:
            result.note(name, f"is not needed: {tables.REASONS[name]}")
        elif target in known_keys() or free_table_of(target):
            new = today_value(name, value)
            result.values[target], result.names[target] = new, name
            text = f"is {target} today"
            if new != value and (name == target or name in tables.CONVERTED):
                now = toml_value(new) if name == target else f"{target} = {toml_value(new)}"
                text = f"= {toml_value(value)} is {now} today"
            result.note(name, text)
        else:
            _reject_if_on(name, value, result)
    return result


def _reject_if_on(name: str, value: Any, result: Translated) -> None:
    """Reject a switch of a feature that does not exist, unless it is off."""
    for feature in tables.NOT_BUILT:
        off = feature.switches.get(tables.TODAY.get(name, name))
        if off is not None and not any(_same(item, value) for item in off):
            problem = f"this library does not have {feature.name} yet"
            result.reject(name, problem, feature.instead or "remove it", value)


def today_value(name: str, value: Any) -> Any:
    """Return the value that today's key has for an old one's."""
    if isinstance(value, str):
        if name == tables.CUSTOM_IMPORT:
            return [value] if value else []
        if name == tables.SPLIT_POINTS:
            return [part.strip() for part in value.split(",") if part.strip()]
        value = tables.OLD_VALUES.get((name, value), value)
    elif name == tables.CONVERTERS and isinstance(value, list):
        return [tables.CONVERTER_NAMES.get(str(item), item) for item in value]
    _, values = tables.CONVERTED.get(name, ("", {}))
    return next((new for old, new in values.items() if _same(old, value)), value)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def settle(values: dict[str, Any], sources: Sequence[Translated]) -> None:
    """Apply the pending keys to `values`, which the sources were merged into, in their order.

    A key that a later source gives by today's name wins over an old key that means the same.
    """
    for index, source in enumerate(sources):
        later = {name for other in sources[index + 1 :] for name in other.today}
        for name in _PENDING:
            if name in source.pending and not {name, tables.TODAY.get(name, name)} & later:
                apply = _switch if name in tables.HANDLER_SWITCHES else _settle
                apply(values, source, name, source.pending[name])
    _leave_out_unused(values, sources)


def _switch(values: dict[str, Any], source: Translated, name: str, value: Any) -> None:
    """Put a handler into `model.handlers`; take it out for a flag that is false."""
    handler, handlers = tables.HANDLER_SWITCHES[name], _handlers(values)
    if type(value) is not bool:
        source.reject(name, "needs true or false", "write true or false", value)
    elif value and handler not in handlers:
        _set(values, source, tables.HANDLERS, [*handlers, handler])
        source.note(name, f'is "{handler}" in {tables.HANDLERS} today')
    elif not value and source.overrides and handler in handlers:
        _set(values, source, tables.HANDLERS, [other for other in handlers if other != handler])
        source.note(name, f'= false is {tables.HANDLERS} without "{handler}" today')


def _settle(values: dict[str, Any], source: Translated, name: str, value: Any) -> None:
    """Apply a key whose meaning depends on other keys."""
    if name == tables.MICROBATCHES:
        size, local = tables.MICROBATCH_SIZE, _get(values, "training.local_batch_size")
        if type(local) is not int or _get(values, "parallelism.pipeline_parallel_degree") == 1:
            return
        if type(value) is not int or value < 1 or local % value:
            problem = f"training.local_batch_size = {local} cannot be cut into {value} microbatches"
            source.reject(name, problem, f"write {size} instead, the sequences of one", value)
        else:
            _set(values, source, size, local // value)
            source.note(name, f"= {value} is {size} = {local // value} today")
    elif name == tables.COMPONENTS and "compile" in _handlers(values):
        if isinstance(value, list) and "model" in value:
            return
        fix = 'list "model" in it, or switch compilation off'
        source.reject(name, "the handler compile compiles the blocks of the model", fix, value)


def _leave_out_unused(values: dict[str, Any], sources: Sequence[Translated]) -> None:
    """Take out the settings, written in old keys, of handlers that are not used."""
    settings, handlers = values.get("handlers", {}), _handlers(values)
    for source in sources:
        for target, name in list(source.names.items()):
            section, handler, *_ = target.split(".")
            if section != "handlers" or handler in handlers or not isinstance(settings, dict):
                continue
            del source.notices[name], source.names[target]
            table = settings.get(handler)
            if isinstance(table, dict):
                table.pop(target.rpartition(".")[2], None)
            if table == {}:
                del settings[handler]


def _handlers(values: dict[str, Any]) -> list[str]:
    handlers = _get(values, tables.HANDLERS)
    return list(handlers) if isinstance(handlers, list | tuple) else []


def _get(values: dict[str, Any], name: str) -> Any:
    """Return the merged value of a key, or its default."""
    section, _, key = name.rpartition(".")
    table = values.get(section, {})
    default = known_keys()[name].default
    return table.get(key, default) if isinstance(table, dict) else default


def _set(values: dict[str, Any], source: Translated, name: str, value: Any) -> None:
    section, _, key = name.rpartition(".")
    values.setdefault(section, {})[key] = value
    source.changed.append(name)
