"""How long a process has been running, from before its first line of Python."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtitan.utils import uptime


def test_counts_from_the_start_of_the_process() -> None:
    code = "import sys, time; time.sleep(0.5); from torchtitan.utils.uptime import *"
    code += "; print(seconds_since_start(), file=sys.stdout)"
    began = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    # The clock of processes ticks 100 times a second.
    assert 0.48 <= float(told.stdout) <= time.monotonic() - began + 0.02


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    first = uptime.seconds_since_start()
    assert 0 <= first <= uptime.seconds_since_start()
