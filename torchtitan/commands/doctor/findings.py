"""What `torchtitan doctor` finds, as a line each."""

from dataclasses import dataclass

from torchtitan.config.errors import ConfigIssue

LOOK = "look"
_MARKS = {True: "ok", False: "WRONG", None: "-", LOOK: LOOK}


@dataclass(frozen=True)
class Finding:
    """Good, bad, merely told (None) or worth a look; about what; what was found; what to do about
    it, where it is bad or worth a look. `common`: all processes of a run find the same."""

    ok: bool | str | None
    subject: str
    text: str
    fix: str = ""
    common: bool = False

    def line(self) -> str:
        """As printed."""
        fix = f". Fix: {self.fix.rstrip('.')}" if self.fix and self.ok in (False, LOOK) else ""
        return f"{_MARKS[self.ok]:<6} {self.subject}: {self.text}{fix}"


def of_problem(problem: ConfigIssue) -> Finding:
    """A problem of a config: bad if it is an error, else worth a look."""
    text = problem.problem.rstrip(". ")
    subject = str(problem).partition(f": {text}")[0]
    return Finding(False if problem.severity == "error" else LOOK, subject, text, problem.fix)
