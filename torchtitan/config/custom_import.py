"""Import the user's modules in `job.custom_import`, which register names for a config.

They may register models, handlers, datasets, tokenizers, losses, optimizers, schedules, masks and
sinks. They are code that runs with the user's rights, so each import is printed, with a digest.
"""

import hashlib
import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.registry import import_traceback
from torchtitan.config.schema import JobConfig

KEY = "job.custom_import"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def import_custom_modules(config: JobConfig, quiet: bool = False) -> list[ConfigIssue]:
    """Import the modules of a config; see `import_modules`."""
    return import_modules(config.job.custom_import, quiet)


def import_modules(names: Iterable[str], quiet: bool = False) -> list[ConfigIssue]:
    """Import the modules in order; return an issue with the traceback of each that fails."""
    problems: list[ConfigIssue] = []
    for name in names:
        problem = _import(name, quiet)
        if problem:
            problems.append(problem)
    return problems


def require_imported(stored: JobConfig) -> None:
    """Raise ConfigError for modules of a stored config that are not imported: it is data."""
    lacking = [name for name in stored.job.custom_import if name not in sys.modules]
    if lacking:
        text = "the checkpoint's run imported modules, and a stored config executes nothing"
        fix = f"if you trust them, add --job.custom_import={','.join(lacking)}"
        raise ConfigError(ConfigIssue(KEY, text, fix, lacking))


def _import(name: str, quiet: bool) -> ConfigIssue | None:
    if name.endswith(".py") or not _MODULE.fullmatch(name):
        fix = "write it as in an import statement, such as my_project.models, and set PYTHONPATH"
        if name.endswith(".py"):
            fix = f"write {Path(name).stem}, and add the folder that holds the file to PYTHONPATH"
        return ConfigIssue(KEY, "is not the dotted name of a module", fix, name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            return _failed(name, error)
        fix = "install it, or add the folder that holds it to PYTHONPATH"
        return ConfigIssue(KEY, f'no module is named "{error.name}"', fix, name)
    except (Exception, SystemExit) as error:  # a script may exit, if nothing asks for __main__
        return _failed(name, error)
    if not quiet:
        print(f"imported {name} {_digest(getattr(module, '__file__', None))}", file=sys.stderr)
    return None


def _failed(name: str, error: BaseException) -> ConfigIssue:
    return ConfigIssue(
        KEY, f"importing it failed:\n{import_traceback(error)}", "correct the module", name
    )


def _digest(file: str | None) -> str:
    if file is None:
        return "(no file)"
    try:
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:  # a part of a zip file
        return f"from {file} (not a file of its own)"
    return f"from {file} (sha256 {digest[:16]})"
