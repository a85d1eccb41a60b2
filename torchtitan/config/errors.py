"""How anything that a user set, and that cannot work, is reported.

A `ConfigIssue` names the key, its value, why it cannot work and what to set instead. Checks return
lists of them, so that a user sees every problem at once; `ConfigError` carries the list.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.utils.redaction import without_secrets

_UNSET = object()


@dataclass(frozen=True)
class ConfigIssue:
    """One thing to mend.

    `key` is `section.key` (or a file, or a flag); `severity` is "error", or "warning" for what is
    reported without stopping the run. `missing_asset` marks what `--check` downgrades to a warning:
    files that need not exist on the machine that checks. `local` is what only this process sees, so
    that it is printed whatever its rank; everything else is printed by rank 0 for all.
    """

    key: str
    problem: str
    fix: str
    value: Any = _UNSET
    severity: str = "error"
    missing_asset: bool = False
    local: bool = False

    def __str__(self) -> str:
        value = "" if self.value is _UNSET else f" = {_toml_like(self.value)}"
        fix = self.fix.rstrip(".")
        end = "" if fix.endswith("?") else "."
        text = f"{self.key}{value}: {self.problem.rstrip('. ')}. Fix: {fix}{end}"
        return without_secrets(text)

    def to_json(self) -> str:
        """Text from which `from_json` makes a problem that reads the same."""
        fields = {key: value for key, value in vars(self).items() if value is not _UNSET}
        return json.dumps(fields, default=str)

    @classmethod
    def from_json(cls, text: str) -> "ConfigIssue":
        """The problem that `to_json` wrote."""
        return cls(**json.loads(text))


class ConfigError(ValueError):
    """The run cannot start as configured. Exit status 2."""

    known_to_all = False
    """Every rank has this very error, so none must learn of it."""

    def __init__(self, problems: Sequence[ConfigIssue] | ConfigIssue):
        self.problems = [problems] if isinstance(problems, ConfigIssue) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def errors_of(problems: Iterable[ConfigIssue]) -> list[ConfigIssue]:
    """Return the problems that stop a run."""
    return [problem for problem in problems if problem.severity == "error"]


class DataError(RuntimeError):
    """The data or the tokenizer cannot be read. Exit status 3."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. Exit status 4."""


class NonFiniteError(RuntimeError):
    """Loss, gradient, weights or optimizer state are not finite. Exit status 5."""


class HangError(RuntimeError):
    """A rank did not arrive where the others wait for it. Exit status 6."""


def _toml_like(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if value is None:
        return "unset"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_like(item) for item in value)}]"
    return str(value)
