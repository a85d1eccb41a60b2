"""SmolLM2-135M-Instruct, a real model, as a Hugging Face folder; see scripts/make_smollm2.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "smollm2"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder, made by the first test that needs it. Tests only read it.

    Where the model cannot be had the test is skipped; in CI it fails.
    """
    if not FOLDER.exists():
        _make(FOLDER)
    return FOLDER


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file from which the folder is made."""
    return Path(_make("--gguf").strip())


def _make(*words: object) -> str:
    """Run the script, once at a time; return what it prints."""
    FOLDER.parent.mkdir(exist_ok=True)
    with FileLock(FOLDER.parent / "smollm2.lock"):
        command = [sys.executable, str(ROOT / "scripts" / "make_smollm2.py"), *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return result.stdout
    reason = f"SmolLM2 cannot be made: {result.stderr.strip().splitlines()[-1:]}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
