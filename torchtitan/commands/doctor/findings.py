"""The findings of `torchtitan doctor`."""

from dataclasses import dataclass

from torchtitan.config.errors import ConfigIssue

LOOK = "look"
_MARKS = {True: "ok", False: "WRONG", None: "-", LOOK: LOOK}


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    `ok` is True, False, None for information, or LOOK for what may be intended. `fix` is for False
    and LOOK. `common`: all processes of a run find the same.
    """

    ok: bool | str | None
    subject: str
    text: str
    fix: str = ""
    common: bool = False

    def line(self) -> str:
        """Return the line as printed."""
        fix = f". Fix: {self.fix.rstrip('.')}" if self.fix and self.ok in (False, LOOK) else ""
        return f"{_MARKS[self.ok]:<6} {self.subject}: {self.text}{fix}"


def of_problem(problem: ConfigIssue) -> Finding:
    """Convert a config issue: an error is wrong, a warning is worth a look."""
    text = problem.problem.rstrip(". ")
    subject = str(problem).partition(f": {text}")[0]
    return Finding(False if problem.severity == "error" else LOOK, subject, text, problem.fix)
