"""Devices and their memory."""

import subprocess
import sys

import pytest
import torch

from torchtitan.utils.device import (
    device_name,
    device_type,
    memory_peak,
    reset_memory_peak,
    synchronize,
)


def test_device_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [device_type("auto"), device_type("cuda"), device_type("cpu")]
    assert found == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device_type("auto"), device_type("cpu")] == ["cpu", "cpu"]
    with pytest.raises(RuntimeError, match="sees no GPU"):
        device_type("cuda")


CPU_PEAK = """
import torch
from torchtitan.utils.device import memory_peak

device = torch.device("cpu")
before = memory_peak(device).reserved_gib
torch.ones(2**27)  # half a GiB, freed at once
after = memory_peak(device)
assert before < 0.9
assert 0.45 < after.reserved_gib - before < 0.6, (before, after)
assert after.reserved_gib < after.capacity_gib
assert after.active_gib is None
"""


def test_peak_of_the_cpu_is_resident_memory() -> None:
    parent = torch.ones(2**28)  # a launcher's memory is not the run's
    subprocess.run([sys.executable, "-c", CPU_PEAK], check=True, timeout=120)
    assert parent.sum() > 0


def test_the_cpu_has_nothing_to_wait_for_or_reset() -> None:
    device = torch.device("cpu")
    synchronize(device)
    reset_memory_peak(device)
    assert device_name(device) == "cpu"


@pytest.mark.gpu
def test_peak_of_a_gpu_can_be_reset() -> None:
    device = torch.device("cuda")
    reset_memory_peak(device)
    tensor = torch.ones(2**28, device=device)
    synchronize(device)
    peak = memory_peak(device)
    assert 1.0 <= peak.active_gib <= peak.reserved_gib <= peak.capacity_gib
    del tensor
    reset_memory_peak(device)
    assert memory_peak(device).active_gib < 1.0
    assert device_name(device) == torch.cuda.get_device_name(device)
