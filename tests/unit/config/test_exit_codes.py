"""Which error ends a run with which exit status."""

import errno
import os

import pytest

from torchtitan.config.errors import CheckpointError, DataError
from torchtitan.config.exit_codes import CHECKPOINT, DATA, FAILED, OUT_OF_MEMORY, exit_code_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), OUT_OF_MEMORY),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), OUT_OF_MEMORY),
        (ValueError("out of memory"), FAILED),
        (RuntimeError("DataLoader worker is out of shared memory"), FAILED),
        (DataError("out of memory"), DATA),
        (CheckpointError("the disk is full"), CHECKPOINT),
    ],
)
def test_exit_status(error: Exception, status: int) -> None:
    assert exit_code_of(error) == status


def test_the_cause_counts() -> None:
    error = CheckpointError("the checkpoint of step 3 was not saved")
    error.__cause__ = MemoryError()
    assert exit_code_of(error) == OUT_OF_MEMORY
