"""What answers before a run starts imports no torch."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = [
    "torchtitan",
    "torchtitan.api.text",
    "torchtitan.api.train",
    "torchtitan.cli",
    "torchtitan.config",
    "torchtitan.preflight",
    "torchtitan.models.registry",
    "torchtitan.models.llama3",
    "torchtitan.models.llama2",
    "torchtitan.models.decoder.args",
    "torchtitan.models.hf_weights",
    "torchtitan.data.registry",
    "torchtitan.handlers",
    "torchtitan.utils.host",
]


def _modules_after(statement: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_imports_no_torch(module: str):
    loaded = _modules_after(f"import {module}")
    assert module in loaded
    assert "torch" not in loaded


def test_the_question_can_be_answered_with_yes():
    assert "torch" in _modules_after("import torchtitan.models.decoder.model")
