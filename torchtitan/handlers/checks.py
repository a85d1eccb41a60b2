"""What must hold of `model.handlers` and `[handlers.NAME]`. No torch."""

from torchtitan.config import ConfigError, Problem
from torchtitan.config.facts import Facts
from torchtitan.config.legacy_keys import HANDLERS_NOT_BUILT
from torchtitan.config.suggest import did_you_mean
from torchtitan.handlers.registry import HANDLERS, HandlerEntry, handler_settings


def check(facts: Facts) -> list[Problem]:
    """Names, order, combinations, settings."""
    known = HANDLERS
    chosen = facts.config.model.handlers
    problems = []
    for place, name in enumerate(chosen):
        if name in HANDLERS_NOT_BUILT and name not in known:
            problem = f"this library does not have {HANDLERS_NOT_BUILT[name]} yet"
            problems.append(Problem("model.handlers", problem, "leave it out", value=name))
        elif name not in known:
            fix = did_you_mean(name, known)
            problems.append(Problem("model.handlers", "is not a handler", fix, value=name))
        elif name in chosen[:place]:
            problem = "is listed twice"
            problems.append(Problem("model.handlers", problem, "list it once", value=name))
    for name in facts.config.handlers:
        if name not in known and not (name in HANDLERS_NOT_BUILT and name in chosen):
            fix = did_you_mean(name, known)
            problems.append(Problem(f"handlers.{name}", "is not a handler", fix))
    if problems:
        return problems
    for name in dict.fromkeys([*chosen, *facts.config.handlers]):
        try:
            handler_settings(facts.config, name)
        except ConfigError as error:
            problems.extend(error.problems)
    return problems or _check_order({name: HANDLERS[name] for name in chosen})


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
    """Nothing on disk."""
    return []
