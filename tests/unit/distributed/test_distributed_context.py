"""The world of a run that no launcher started."""

import tempfile
from pathlib import Path

import pytest
import torch

from torchtitan.distributed.context import open_context
from torchtitan.utils.environment import ProcessEnvironment


def test_one_process_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it would leave behind when it is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_context("cpu", ProcessEnvironment(), 60) as world:
        value = torch.ones(1)
        torch.distributed.all_reduce(value, group=world.control_group)
        assert (world.world_size, value.item()) == (1, 1.0)
        assert list(tmp_path.iterdir()) == []
