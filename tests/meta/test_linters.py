"""ruff, mypy, the import contracts and shellcheck find nothing. pyproject.toml configures them."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))

SHELL_SCRIPTS = [
    "run_llama_train.sh",
    "run_tests.sh",
    "multinode_trainer.slurm",
    "scripts/setup_env.sh",
    "scripts/slurm_test_cluster.sh",
    ".ci/run",
]

LINTERS = {
    "ruff": [sys.executable, "-m", "ruff", "check", "--quiet", "."],
    "mypy": [sys.executable, "-m", "mypy"],
    "import-linter": [str(SCRIPTS / "lint-imports"), "--no-cache"],
    "shellcheck": [str(SCRIPTS / "shellcheck"), "--external-sources", *SHELL_SCRIPTS],
}


@pytest.mark.parametrize("name", LINTERS)
def test_linter_finds_nothing(name: str):
    run = subprocess.run(LINTERS[name], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{name} says:\n{run.stdout}{run.stderr}"


def test_every_shell_script_is_checked():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    scripts = {name for name in tracked if name.endswith((".sh", ".slurm"))} | {".ci/run"}
    assert scripts == set(SHELL_SCRIPTS)
