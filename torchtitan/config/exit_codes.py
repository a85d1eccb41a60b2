"""Exit statuses, and which error ends a run with which.

torchrun turns every failure into 1, so a scheduler reads `run_status.json` in the run folder.
"""

from torchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HangError,
    NonFiniteError,
)
from torchtitan.utils.processes import StopRequested

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
    HangError: HANG,
    StopRequested: PREEMPTED,
    KeyboardInterrupt: INTERRUPTED,
}


_OUT_OF_MEMORY_NAMES = {"OutOfMemoryError", "MemoryError"}
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "out of memory",
)
"""Messages of torch's allocator for CPUs, which raises RuntimeError, of the C library, and of CUDA
and NCCL where they allocate past torch's allocator."""


def exit_code_of(error: BaseException) -> int:
    """Return the exit status for an error; 1 for one that nobody foresaw.

    Running out of memory is recognised by name and text, because torch is not imported here; also
    where it is the cause of another error.
    """
    for kind, code in _BY_ERROR.items():
        if isinstance(error, kind):
            return OUT_OF_MEMORY if _is_out_of_memory(error.__cause__) else code
    return OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED


def _is_out_of_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    names = {base.__name__ for base in type(error).__mro__}
    text = str(error).lower()
    is_torch_s_or_c_s = isinstance(error, RuntimeError | OSError)
    return (
        bool(names & _OUT_OF_MEMORY_NAMES)
        or (is_torch_s_or_c_s and any(words in text for words in _OUT_OF_MEMORY_TEXTS))
        or _is_out_of_memory(error.__cause__)
    )
