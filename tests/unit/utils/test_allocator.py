"""The allocator keeps what it has: seen in the page faults of a process of its own."""

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Allocates and fills 64 MiB a few times, as a training step does; the first time may fault.
FAULTS = """
import resource, sys, threading
from torchtitan.utils.host import tune_cpu_allocator
assert "torch" not in sys.modules

if sys.argv[1] == "tuned":
    assert tune_cpu_allocator() is True

def step():
    block = bytearray(b"x") * (64 << 20)
    assert len(block) == 64 << 20

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)

thread = threading.Thread(target=step)  # from another arena, larger than its heaps
thread.start()
thread.join()
"""


def _faults(mode: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True, timeout=60
    )
    return int(run.stdout)


@glibc
def test_a_step_that_was_made_before_causes_no_page_faults():
    assert _faults("tuned") < 200


@glibc
def test_the_system_allocator_faults_in_every_step():
    # 64 MiB are 16,384 small pages, or 32 large ones where the kernel gives those.
    assert _faults("system") > 5 * _faults("tuned") + 100
