"""The wait of threads is set before torch is there, and a user's choice stands."""

import os
import subprocess
import sys

import pytest

from torchtitan.utils.host import spin_briefly


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_choice_of_the_environment_stands(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


@pytest.mark.parametrize(
    ("setting", "expected"), [("tuned", "spin allocator train"), ("system", "spin train")]
)
def test_process_is_set_up_before_torch_is_imported(setting: str, expected: str) -> None:
    """The command `train` without what would take time."""
    script = f"""
import sys, types
from torchtitan.cli import main
from torchtitan.api import start as train

calls = []
def note(name):
    def call(*arguments):
        calls.append(name)
        assert "torch" not in sys.modules
        return 0
    return call

train.spin_briefly = note("spin")
train.tune_cpu_allocator = note("allocator")
sys.modules["torchtitan.training.run"] = types.SimpleNamespace(run=note("train"))
main(["train", "--job.device=cpu", "--debug.cpu_allocator={setting}",
    "--job.dump_folder=/nonexistent/never", "--training.dataset=stdlib"])
print(*calls)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
