"""The order of things in the loop, and what its time is booked on, seen from inside a real run."""

import sys
from pathlib import Path

from tests.distributed import runs
from tests.forked import execute

_SCRIPT = """
import sys
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.training.nonfinite_guard import NonFiniteGuard
from torchtitan.metrics.goodput import TimeSplit
from torchtitan.metrics.logger import MetricsLogger
from torchtitan.training.prefetch import Prefetch
from torchtitan.utils.garbage import GarbageCollection

calls, splits, reads = [], [], []


def note(kind, method, name):
    original = getattr(kind, method)

    def noted(self, *arguments, **named):
        calls.append(name(*arguments, **named))
        return original(self, *arguments, **named)

    setattr(kind, method, noted)


note(NonFiniteGuard, "flush", lambda: "check")
note(MetricsLogger, "flush", lambda: "flush")
note(CheckpointManager, "save", lambda state, *rest: f"save-{state.step}")
note(GarbageCollection, "step", lambda step: f"garbage-{step}")
start_of_split, start_of_reading = TimeSplit.__init__, Prefetch.start


def keep(self, *arguments, **named):
    splits.append(self)
    start_of_split(self, *arguments, **named)


def read(self):
    reads.append(splits[0]._activities[-1])
    start_of_reading(self)


TimeSplit.__init__, Prefetch.start = keep, read
from torchtitan.cli import main

status = main(["train", *sys.argv[1:]])
print("CALLS", *calls)
print("READS", *reads)
sys.exit(status)
"""


def test_order_around_a_checkpoint(tmp_path: Path) -> None:
    """Only finite steps are saved, and what was logged is on the disk before a checkpoint commits:
    a resume must find the curve up to its step."""
    command = runs.command(tmp_path / "run", "--checkpoint.interval=2", "--training.steps=4")
    arguments = command[command.index("torchtitan.train") + 1 :]
    done = execute([sys.executable, "-c", _SCRIPT, *arguments], env=runs.environment())
    assert done.returncode == 0, done.stderr
    calls = next(line for line in done.stdout.splitlines() if line.startswith("CALLS")).split()
    assert calls[1:] == [
        "garbage-1",
        *("check", "flush", "save-2", "garbage-2"),
        "garbage-3",
        *("check", "flush", "save-4", "garbage-4"),
        "check",
    ]
    reads = next(line for line in done.stdout.splitlines() if line.startswith("READS")).split()
    assert reads[1:] == ["data"] * 4
