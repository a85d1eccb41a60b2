"""What a machine without the right devices, or with an old torch, is told."""

import pytest
import torch

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.preflight.hardware import check_environment


def problems(device: str, *arguments: str) -> list[ConfigIssue]:
    return check_environment(
        RunContext(load_config([f"--job.device={device}", *arguments]).config, 8, "cuda")
    )


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch tells: there need not be any."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    variables = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    for name, value in (variables | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def test_device_for_this_process(two_gpus: None):
    assert problems("cuda") == []


def test_more_processes_than_devices(two_gpus: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    (problem,) = problems("cuda")
    assert str(problem).startswith("LOCAL_RANK = 2: there are 2 visible CUDA devices")
    assert problem.local  # the ranks that have a device do not see it


def test_bfloat16_on_an_old_gpu(two_gpus: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    (problem,) = problems("cuda")
    assert problem.key == "training.mixed_precision_param"
    assert "7.5, and bfloat16 needs 8.0" in str(problem)
    assert problems("cuda", "--training.mixed_precision_param=float32") == []


def test_no_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = problems("cuda")
    assert problem.key == "job.device"
    assert problems("auto") == []


def test_old_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    (problem,) = problems("auto")
    assert "2.10.1+cpu is too old" in str(problem)
    assert "2.11 or newer" in problem.fix
