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
"""Done: every step was trained and the last checkpoint is good."""
FAILED = 1
"""An unexpected error; torchrun turns every other status into this one."""
CONFIG = 2
"""The config or the command line: what to change is printed, and nothing was started."""
DATA = 3
"""The data or the tokenizer cannot be read."""
CHECKPOINT = 4
"""A checkpoint cannot be written or read."""
NON_FINITE = 5
"""The loss, the gradient, the weights or the optimizer state are not finite."""
HANG = 6
"""A rank did not start, was stuck, or did not arrive where the others waited for it: the log names
it; or a process was aborted (`SIGABRT`), as NCCL does after a timeout."""
PREEMPTED = 7
"""Stopped by a signal: before the first step, or after a step, which is saved if
`checkpoint.enable` is set."""
OUT_OF_MEMORY = 8
"""Out of memory, of a GPU or of the machine."""
NOT_FOUND = 9
"""`--check`: nothing is wrong, but not all files of the run are on this machine."""
INTERRUPTED = 130
"""Interrupted at once: by a second Ctrl-C, or by one before the first step."""

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
