"""Registries of names that a config may use. No torch.

The library registers its own. An installed package adds names by entry points of the registry's
group, whose code is imported when a name is used; a module in `job.custom_import` registers itself
when it is imported. A name that two packages give is rejected when it is used, and one of the
library's cannot be registered again.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from keyword import iskeyword
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import Section
from torchtitan.config.value_errors import problems_of_table

T = TypeVar("T")
D = TypeVar("D", bound=Any)
BUILT_IN = "built in"


class Registry(Generic[T]):
    """Things of one kind, by name."""

    def __init__(self, key: str, group: str, admit: Callable[[str, Any], T]):
        """Make an empty registry.

        `key` of the config takes the names; `group` is that of the entry points. `admit(name,
        thing)` makes an entry of what a package or a module gives, or raises TypeError.
        """
        self.key = key
        self.group = group
        self._admit = admit
        self._registered: dict[str, tuple[T, str]] = {}
        self._given: dict[str, tuple[Any, Any]] = {}
        """The registered things, with the spec of their module then: each import makes another."""
        self._loaded: dict[str, T] = {}

    def add_built_in(self, name: str, entry: T) -> None:
        """Add an entry of the library's own."""
        self._registered[name] = entry, BUILT_IN

    def register(self, name: str, thing: Any, origin: str) -> None:
        """Add what the module `origin` gives, which may do so again when it is imported again.

        Raises:
            ValueError: the name is taken.
            TypeError: `thing` is not of this kind.
        """
        known = self._registered.get(name)
        given = thing, getattr(sys.modules.get(origin), "__spec__", None)
        if known is not None and (known[1] != origin or not self._is_again(name, *given)):
            raise ValueError(f"{name!r} is registered already, by {known[1]} ({self.group})")
        self._registered[name] = self._admit(name, thing), origin
        self._given[name] = given

    def decorator(self, name: str) -> Callable[[D], D]:
        """Return a decorator that registers a class or function as `name`."""
        require_text(name)

        def register(thing: D) -> D:
            self.register(name, thing, thing.__module__)
            return thing

        return register

    def __contains__(self, name: str) -> bool:
        return name in self._registered or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter({**self._registered, **self._installed})

    def get(self, name: str) -> T | None:
        """Return the entry, or None for an unknown name.

        Raises:
            ConfigError: a package gives it that cannot be imported, gives something else, or is
                not the only one.
        """
        if name in self._registered and name not in self._installed:
            return self._registered[name][0]
        if name not in self._loaded and name in self._installed:
            self._loaded[name] = self._load(name)
        return self._loaded.get(name)

    def __getitem__(self, name: str) -> T:
        entry = self.get(name)
        if entry is None:
            raise KeyError(name)
        return entry

    def origin(self, name: str) -> str:
        """Return who gives it: `built in`, a module, or a package with its version."""
        given = [self._registered[name][1]] if name in self._registered else []
        return " and ".join(given + [_package(point) for point in self._installed.get(name, [])])

    def entries(self) -> dict[str, T]:
        """Return all entries that can be imported, by name."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except ConfigError:
                continue
        return found

    def _is_again(self, name: str, thing: Any, spec: Any) -> bool:
        """Return whether a module gives what it gave before, not a second thing of that name."""
        known, known_spec = self._given[name]
        return known is thing or known == thing or spec is None or spec is not known_spec

    @cached_property
    def _installed(self) -> Mapping[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            known = found.setdefault(point.name, [])
            # A package that is found twice on the path is still one.
            if all(_package(other) != _package(point) for other in known):
                known.append(point)
        return found

    def _load(self, name: str) -> T:
        points = self._installed[name]
        given = self._registered.get(name)
        if given is not None and [point.module for point in points] == [given[1]]:
            return given[0]  # a module that registers itself, and is imported by name, too
        if len(points) > 1 or given is not None:
            fix = "uninstall one of the packages, or rename what it gives"
            raise self._error(name, f"is given by {self.origin(name)}", fix)
        [point] = points
        gives, thing = f"{_package(point)} gives {point.value}", None
        try:
            thing = point.load()
            return self._admit(name, thing)
        except (Exception, SystemExit) as error:  # a script may exit, if nothing asks for __main__
            if thing is not None and isinstance(error, TypeError):
                problem = f"{gives}, which does not fit: {error}"
            else:
                problem = f"{gives}, whose import failed:\n{import_traceback(error)}"
        raise self._error(name, problem, "correct the package, or uninstall it")

    def _error(self, name: str, problem: str, fix: str) -> ConfigError:
        return ConfigError(ConfigIssue(self.key, problem, fix, value=name))


def settings_of(thing: Any, what: str) -> type[Section]:
    """Return the `Settings` of a registered class or function, an empty `Section` without one.

    Raises TypeError, in which the thing is called `what`, if they are not a `Section`.
    """
    settings = getattr(thing, "Settings", Section)
    if not (isinstance(settings, type) and issubclass(settings, Section)):
        raise TypeError(f"Settings of {what} is not a Section")
    return settings


def validated(settings: type[Section], values: Any, table: str) -> Any:
    """Return `settings` made of a free-form table's values.

    Raises:
        ConfigError: a key of `table` is unknown, or its value does not fit.
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems_of_table(error, table, settings)) from None


def require_text(name: Any) -> None:
    """Raise TypeError for a decorator without a name, which would take the class for it."""
    if not isinstance(name, str):
        raise TypeError(f'{name!r} is no name: write one behind the decorator, as ("my_name")')


def require_word(name: str) -> None:
    """Raise TypeError for a name that cannot be written as `--table.name.key`."""
    if not name.isidentifier() or iskeyword(name):
        raise TypeError(f"the name {name!r} has to be a word of letters, digits and _")


def import_traceback(error: BaseException) -> str:
    """Return the traceback of a failed import, indented.

    Frames that led to the import, and those of Python's import system, are left out.
    """
    told = traceback.TracebackException.from_exception(error)
    frames = list(told.stack)
    system = [frame for frame in frames if frame.filename.startswith("<frozen importlib")]
    first = frames.index(system[0]) if system else 0
    kept = [frame for frame in frames[first:] if frame not in system]
    told.stack = traceback.StackSummary.from_list(kept)
    return "".join(f"    {line}\n" for line in "".join(told.format()).splitlines()).rstrip()


def lazily(path: str) -> Callable[[], Any]:
    """Return a function that imports `module:name` when it is called."""
    module, _, name = path.partition(":")
    return lambda: getattr(import_module(module), name)


def calling_module() -> str:
    """Return the module that calls the caller of this function."""
    return str(sys._getframe(2).f_globals.get("__name__", "?"))


def _package(point: EntryPoint) -> str:
    package = point.dist
    return f"{package.name} {package.version}" if package is not None else point.value
