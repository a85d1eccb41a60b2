"""Every TOML of train_configs/ passes --check at the world size that its first comment states."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))


def first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])


def check(path: Path, world_size: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchtitan.cli", "train", str(path), "--check", *arguments],
        env={**os.environ, "WORLD_SIZE": world_size},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_checks_at_its_world_size(path: Path):
    comment = first_comment(path)
    world_size = re.search(r"WORLD_SIZE=(\d+)", comment)
    assert world_size, f"{path.name}: the first comment must say WORLD_SIZE=..."
    assert "run_llama_train.sh" in comment or "multinode_trainer.slurm" in comment
    result = check(path, world_size[1])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_has_a_folder_of_its_own(path: Path):
    assert f'dump_folder = "./outputs/{path.stem}"' in path.read_text()


def test_the_configs_that_are_promised_are_there():
    promised = {"llama3_8b", "llama3_70b", "llama3_405b", "llama3_2_1b", "llama3_2_3b"}
    assert promised | {"debug_model"} <= {path.stem for path in CONFIGS}


def test_the_check_can_fail():
    assert check(ROOT / "train_configs" / "llama3_8b.toml", "7").returncode == 2
