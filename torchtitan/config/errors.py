"""Report settings that cannot work.

A `ConfigIssue` names the key, its value, why it cannot work and what to set instead. Checks return
lists of them, so that a user sees all at once; `ConfigError` carries the list.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torchtitan.utils.redaction import without_secrets


class _Unset(Enum):
    """No value; the same object also when it comes from another process."""

    UNSET = 0


_UNSET = _Unset.UNSET


@dataclass(frozen=True)
class ConfigIssue:
    """One setting to correct.

    `key` is `section.key` (or a file, or a flag); `severity` is "error", or "warning" for what is
    reported without stopping the run. `missing_asset` marks files that need not exist on the
    machine that checks, which `--check` turns into warnings. `local` marks what only this process
    sees: it is printed whatever the rank, while rank 0 prints everything else for all.
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
        """Return text from which `from_json` makes an equal issue."""
        fields = {key: value for key, value in vars(self).items() if value is not _UNSET}
        return json.dumps(fields, default=str)

    @classmethod
    def from_json(cls, text: str) -> "ConfigIssue":
        """Return the issue that `to_json` wrote."""
        return cls(**json.loads(text))


class ConfigError(ValueError):
    """Settings that keep the run from starting. Exit status 2."""

    known_to_all = False
    """Every rank has this very error, so none must learn of it."""

    def __init__(self, problems: Sequence[ConfigIssue] | ConfigIssue):
        self.problems = [problems] if isinstance(problems, ConfigIssue) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the problems, which a pool of processes passes on, instead of their text."""
        return type(self), (self.problems,), vars(self)


def warning(key: str, problem: str, fix: str, value: Any = _UNSET) -> ConfigIssue:
    """Return an issue that does not stop a run."""
    return ConfigIssue(key, problem, fix, value, severity="warning")


def errors_of(problems: Iterable[ConfigIssue]) -> list[ConfigIssue]:
    """Return the issues that stop a run."""
    return [problem for problem in problems if problem.severity == "error"]


class DataError(RuntimeError):
    """Data or a tokenizer that cannot be read. Exit status 3."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. Exit status 4."""


class NonFiniteError(RuntimeError):
    """Loss, gradients, weights or optimizer state that are not finite. Exit status 5."""


class HangError(RuntimeError):
    """A rank that did not arrive in time. Exit status 6."""


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
