"""Exit statuses, and which error ends a run with which.

torchrun turns every failure into 1, so a scheduler reads `run_status.json` in the run folder.
"""

from torchtitan.config.errors import CheckpointError, ConfigError, DataError, NonFiniteError

DONE = 0
FAILED = 1
CONFIG = 2
DATA = 3
CHECKPOINT = 4
NON_FINITE = 5
HANG = 6
PREEMPTED = 7
OUT_OF_MEMORY = 8
NOT_FOUND = 9
"""`--check` found nothing wrong, but not all files of the run on this machine."""
INTERRUPTED = 130

_BY_ERROR: dict[type[BaseException], int] = {
    ConfigError: CONFIG,
    DataError: DATA,
    CheckpointError: CHECKPOINT,
    NonFiniteError: NON_FINITE,
    KeyboardInterrupt: INTERRUPTED,
}


def exit_code_of(error: BaseException) -> int:
    """The exit status for an error; 1 for one that nobody foresaw.

    Running out of device memory is recognised by name, because torch is not imported here.
    """
    for kind, code in _BY_ERROR.items():
        if isinstance(error, kind):
            return code
    if error.__cause__ is not None and exit_code_of(error.__cause__) == OUT_OF_MEMORY:
        return OUT_OF_MEMORY
    names = {base.__name__ for base in type(error).__mro__}
    return OUT_OF_MEMORY if names & {"OutOfMemoryError", "MemoryError"} else FAILED
