"""What must hold of `model.handlers` and `[handlers.NAME]`. No torch, but in `probe`."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec

from torchtitan.config import ConfigError, Problem
from torchtitan.config.errors import errors_of
from torchtitan.config.facts import Facts
from torchtitan.config.suggest import fix_of_registered
from torchtitan.handlers.registry import HANDLERS, HandlerEntry, handler_settings


def check(facts: Facts) -> list[Problem]:
    """Names, order, combinations, settings."""
    known = HANDLERS
    chosen = facts.config.model.handlers
    problems = []
    for place, name in enumerate(chosen):
        if name not in known:
            fix = fix_of_registered(name, known)
            problems.append(Problem("model.handlers", "is not a handler", fix, value=name))
        elif name in chosen[:place]:
            problem = "is listed twice"
            problems.append(Problem("model.handlers", problem, "list it once", value=name))
    for name in facts.config.handlers:
        if name not in known:
            fix = fix_of_registered(name, known)
            problems.append(Problem(f"handlers.{name}", "is not a handler", fix))
    if problems:
        return problems
    for name in dict.fromkeys([*chosen, *facts.config.handlers]):
        problems += _asked(name, "Settings", partial(_settings_problems, facts, name))
    if problems:
        return problems
    entries = {name: HANDLERS[name] for name in chosen}
    problems += [*_check_order(entries), *_check_packages(entries)]
    for name, entry in entries.items():
        if not errors_of(problems):
            settings = handler_settings(facts.config, name)
            problems += _asked(name, "check", partial(entry.check, facts, settings))
    return problems


def _settings_problems(facts: Facts, name: str) -> list[Problem]:
    handler_settings(facts.config, name)
    return []


def _asked(name: str, what: str, ask: Callable[[], Iterable[Problem]]) -> list[Problem]:
    """What a handler finds; for what it raises, whose fault that is, with its own traceback."""
    try:
        return list(ask())
    except ConfigError as error:
        return error.problems
    except Exception:
        lines = traceback.format_exc().rstrip().replace("\n", "\n    ")
        problem = f"its {what} ({HANDLERS.origin(name)}) fails:\n    {lines}"
        return [Problem("model.handlers", problem, "mend the handler", value=name)]


def _check_packages(chosen: dict[str, HandlerEntry]) -> Iterator[Problem]:
    """Looks for the packages, without importing them."""
    for name, entry in chosen.items():
        if entry.package and not _is_installed(entry.package):
            problem = f"it needs {entry.package}, which is not installed"
            what = f'"torchtitan[{entry.extra}]"' if entry.extra else entry.package
            yield Problem("model.handlers", problem, f"pip install {what}", value=name)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # what a dotted name begins with
        return False


def _check_order(chosen: dict[str, HandlerEntry]) -> list[Problem]:
    names, problems = list(chosen), []
    for place, (name, entry) in enumerate(chosen.items()):
        for earlier in entry.after:
            if earlier in names[place:]:
                fix = f"list {earlier} before {name}"
                problem = f"has to come after {earlier}"
                problems.append(Problem("model.handlers", problem, fix, value=name))
        for other in entry.excludes:
            if other in chosen:
                problem = f"cannot be combined with {other}"
                fix = f"leave out {name} or {other}"
                problems.append(Problem("model.handlers", problem, fix, value=name))
    return problems


def probe(facts: Facts) -> list[Problem]:
    """Whether this machine's devices can do what the handlers ask of them."""
    config = facts.config
    return [
        problem
        for name in config.model.handlers
        for problem in _asked(
            name, "probe", partial(HANDLERS[name].probe, facts, handler_settings(config, name))
        )
    ]
