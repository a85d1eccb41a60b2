"""TorchTitan's TOMLs of three releases, and its flags, in today's keys.

Each source, the file and the command line, is translated by itself (`translate`), so that the
command line wins over the file whichever names either uses. What depends on several keys waits
until both are merged (`settle`). Every key that is translated gives one notice; one that switches
on what does not exist gives a problem. The tables are in `legacy_keys.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torchtitan.config import legacy_keys as tables
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import Key, free_table_of, known_keys, known_sections
from torchtitan.config.legacy_keys import Feature
from torchtitan.config.toml_text import toml_value

HANDLERS = "model.handlers"
MICROBATCH_SIZE = "parallelism.pipeline_parallel_microbatch_size"


@dataclass
class Translated:
    """One source's older keys: what they are today, and what is to be said about them."""

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
    """Every key of the tables with the default it had, also where a section has the key by now."""
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
    """Whether a dotted name is one of TorchTitan's that no section has today."""
    return name in old_defaults() and name not in known_keys()


def is_old_section(name: str) -> bool:
    """Whether a table held keys of TorchTitan's, and is no section today."""
    return name not in known_sections() and any(
        key.startswith(name + ".") for key in old_defaults()
    )


def is_old(name: str, value: Any) -> bool:
    """Whether the key, or the value of today's key, is one that has to be translated."""
    return is_old_key(name) or (
        isinstance(value, str)
        and ((name, value) in tables.OLD_VALUES or (name, value) in _values_not_built())
    )


def today_name(name: str) -> str:
    """The key to write instead of an old one; the old one itself if there is no such."""
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
    """How an old key is written on the command line; None if the name is none."""
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
    """A TOML table without its old keys, and these by dotted name. Tables that held no other kind
    of key are gone, too."""
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
    """`old` in today's keys. `today` are the keys of the same source that need no translation, and
    `dashes` how its keys begin where the user wrote them."""
    result = Translated()
    for name, value in old.items():
        if value is None:  # `None` on the command line: as if it were not there
            continue
        target = today_name(name)
        others = [target] if target in today and target != name else []
        if name not in tables.HANDLER_SWITCHES and target in result.names:
            others.append(result.names[target])
        if others:
            problem = f"is {target} today, and `{dashes}{others[0]}` is set too"
            fix = f"keep `{dashes}{target}` alone"
            result.problems.append(ConfigIssue(dashes + name, problem, fix, value))
        else:
            _translate_one(name, value, target, dashes + name, result)
    return result


def _translate_one(name: str, value: Any, target: str, shown: str, result: Translated) -> None:
    if name in tables.HANDLER_SWITCHES or name in tables.BY_OTHER_KEYS:
        result.pending[name] = value
    elif name in tables.IGNORED:
        reason = tables.IGNORED[name][1]
        if reason and value:
            result.notices[name] = f"{shown} is not needed: {reason}"
    elif not is_old_key(name):  # today's key with an older value
        feature = _values_not_built().get((name, value))
        if feature:
            result.problems.append(_not_built(shown, value, Feature(feature, {})))
        else:
            _set(result, name, name, shown, value, tables.OLD_VALUES[name, value])
    elif target in known_keys() or free_table_of(target):
        problem = _moe_converter(shown, value) if name == tables.CONVERTERS else None
        if problem:
            result.problems.append(problem)
        else:
            _set(result, target, name, shown, value, today_value(name, value))
    else:
        problem = _switched_on(target, today_value(name, value), shown, value)
        result.problems += [problem] if problem else []


def _set(result: Translated, target: str, name: str, shown: str, value: Any, today: Any) -> None:
    result.values[target] = today
    result.names[target] = name
    if target == name:
        result.notices[name] = f"{shown} = {toml_value(value)} is {toml_value(today)} today"
    elif name in tables.CONVERTED and today != value:
        as_today = f"{target} = {toml_value(today)}"
        result.notices[name] = f"{shown} = {toml_value(value)} is {as_today} today"
    else:
        result.notices[name] = f"{shown} is {target} today"


def today_value(name: str, value: Any) -> Any:
    """The value of an old key as today's key has it."""
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


def _moe_converter(shown: str, value: Any) -> ConfigIssue | None:
    experts = value if isinstance(value, list) else []
    if not any(name in tables.MOE_CONVERTERS for name in experts):
        return None
    return _not_built(shown, value, Feature("a mixture of experts", {}))


def _switched_on(name: str, value: Any, shown: str, given: Any) -> ConfigIssue | None:
    """The problem of a feature that is not there, unless the value leaves it off."""
    for feature in tables.NOT_BUILT:
        off = feature.switches.get(name)
        if off is not None and not any(_same(item, value) for item in off):
            writable = next((item for item in off if item not in (None, "")), None)
            if not _same(given, value):  # a converted key, whose "off" is written otherwise
                writable = None
            return _not_built(shown, given, feature, writable)
    return None


def _not_built(shown: str, value: Any, feature: Feature, off: Any = None) -> ConfigIssue:
    fix = "remove it" if off is None else f"remove it, or set it to {toml_value(off)}"
    problem = f"this library does not have {feature.name} yet"
    return ConfigIssue(shown, problem, feature.instead or fix, value)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _values_not_built() -> dict[tuple[str, str], str]:
    return {
        (name, value): feature
        for (name, value), feature in tables.NOT_BUILT_VALUES.items()
        if value not in known_keys()[name].choices
    }


@dataclass
class Settled:
    """What `settle` found beside changing the values."""

    problems: list[ConfigIssue] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    by_flags: list[str] = field(default_factory=list)
    """Today's keys that the command line changed."""

    def put(self, values: dict[str, Any], name: str, value: Any, item: "_Waiting") -> None:
        """Set today's key to what an old one says."""
        section, _, key = name.rpartition(".")
        values.setdefault(section, {})[key] = value
        if item.dashes:
            self.by_flags.append(name)


def settle(
    values: dict[str, Any], file: Translated, flags: Translated, flags_today: Collection[str]
) -> Settled:
    """Apply what waited for file and command line to be merged into `values`, in place.

    `flags_today` are the keys that the command line gave by today's names: they win over an old
    key of the file that means the same.
    """
    settled = Settled()
    waiting = [item for item in _waiting(file) if item.is_none_of(flags_today)]
    waiting += _waiting(flags, "--")
    handlers = _get(values, HANDLERS)
    handlers = list(handlers) if isinstance(handlers, list | tuple) else []
    for item in waiting:
        if item.name in tables.HANDLER_SWITCHES:
            _switch(handlers, item, values, settled)
        elif item.name == tables.MICROBATCHES:
            _cut_microbatches(values, item, settled)
        elif item.name == tables.TOTAL_STEPS:
            if item.value != _get(values, "training.steps"):
                instead = "set training.steps to it, which the learning rate follows"
                feature = Feature("a learning rate for another number of steps", {}, {}, instead)
                settled.problems.append(_not_built(item.shown, item.value, feature))
        elif "compile" in handlers and not (isinstance(item.value, list) and "model" in item.value):
            problem = "the handler compile compiles the blocks of the model"
            fix = 'list "model" in it, or switch compilation off'
            settled.problems.append(ConfigIssue(item.shown, problem, fix, item.value))
    _leave_out_unused(values, handlers, file, flags)
    settled.notices += [*file.notices.values(), *flags.notices.values()]
    return settled


@dataclass(frozen=True)
class _Waiting:
    """An old key that waits for the others to be merged."""

    name: str
    value: Any
    dashes: str

    @property
    def shown(self) -> str:
        """The key as the user wrote it."""
        return self.dashes + self.name

    def is_none_of(self, names: Collection[str]) -> bool:
        """Whether neither the key nor today's is among the names."""
        return self.name not in names and today_name(self.name) not in names


def _waiting(source: Translated, dashes: str = "") -> list[_Waiting]:
    """Handlers first, in the order in which they have to be listed."""
    order = [*tables.HANDLER_SWITCHES, *tables.BY_OTHER_KEYS]
    return [
        _Waiting(name, source.pending[name], dashes) for name in order if name in source.pending
    ]


def _switch(handlers: list[str], item: _Waiting, values: dict[str, Any], settled: Settled) -> None:
    """Put a handler into the list, or take it out where the command line says so."""
    handler = tables.HANDLER_SWITCHES[item.name]
    if type(item.value) is not bool:
        problem = ConfigIssue(item.shown, "needs true or false", "write true or false", item.value)
        settled.problems.append(problem)
    elif item.value and handler not in handlers:
        handlers.append(handler)
        settled.notices.append(f'{item.shown} is "{handler}" in {HANDLERS} today')
        settled.put(values, HANDLERS, list(handlers), item)
    elif not item.value and item.dashes and handler in handlers:
        handlers.remove(handler)
        settled.notices.append(f'{item.shown} = false is {HANDLERS} without "{handler}" today')
        settled.put(values, HANDLERS, list(handlers), item)


def _cut_microbatches(values: dict[str, Any], item: _Waiting, settled: Settled) -> None:
    """So many microbatches of a rank's batch are one size of a microbatch."""
    local, count = _get(values, "training.local_batch_size"), item.value
    if type(local) is not int or local < 1:
        return  # has its own problem
    if _get(values, "parallelism.pipeline_parallel_degree") == 1:
        return
    if type(count) is not int or count < 1:
        problem = "is not a number of microbatches"
        fix = f"write {MICROBATCH_SIZE} instead, the sequences of one"
        settled.problems.append(ConfigIssue(item.shown, problem, fix, count))
    elif local % count:
        problem = f"training.local_batch_size = {local} cannot be cut into {count} microbatches"
        below = next(n for n in range(min(count, local), 0, -1) if local % n == 0)
        fix = f"write {MICROBATCH_SIZE} = {local // below} instead, which makes {below}"
        settled.problems.append(ConfigIssue(item.shown, problem, fix, count))
    else:
        size = local // count
        settled.notices.append(f"{item.shown} = {count} is {MICROBATCH_SIZE} = {size} today")
        settled.put(values, MICROBATCH_SIZE, size, item)


def _leave_out_unused(
    values: dict[str, Any], handlers: list[str], file: Translated, flags: Translated
) -> None:
    """Take out the settings, written in old keys, of handlers that are not used."""
    settings = values.get("handlers", {})
    if not isinstance(settings, dict):
        return  # has its own problem
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


def _get(values: dict[str, Any], name: str) -> Any:
    """The merged value of a key, or its default."""
    section, _, key = name.rpartition(".")
    table = values.get(section, {})
    default = known_keys()[name].default
    return table.get(key, default) if isinstance(table, dict) else default
