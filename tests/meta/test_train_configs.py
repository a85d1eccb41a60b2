"""Every TOML of train_configs/ passes --check at each world size that its first comment states."""

import math
import re
from pathlib import Path

import pytest

from torchtitan.cli import main
from torchtitan.config.load import load_toml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))


def first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])


def stated(path: Path) -> dict[int, str]:
    """Return what the first comment says of each world size."""
    _, *parts = re.split(r"WORLD_SIZE=(\d+)", first_comment(path))
    return {int(size): text for size, text in zip(parts[::2], parts[1::2], strict=True)}


def check(path: Path, world_size: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit status of `torchtitan train PATH --check`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    return main(["train", str(path), "--check"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_checks_at_its_world_sizes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    comment = first_comment(path)
    assert stated(path), f"{path.name}: the first comment must say WORLD_SIZE=..."
    assert "run_llama_train.sh" in comment or "multinode_trainer.slurm" in comment
    for world_size in stated(path):
        status = check(path, str(world_size), monkeypatch)
        printed = capsys.readouterr()
        # Of what the larger ones read nothing is in the clone.
        assert status == (9 if "not checked" in printed.out else 0), printed.err
        assert "ok: " in printed.out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_has_a_folder_of_its_own(path: Path):
    assert f'dump_folder = "./outputs/{path.stem}"' in path.read_text()


def test_the_configs_that_are_promised_are_there():
    promised = {
        "debug_model",
        "debug_mixture",
        "debug_validation",
        "debug_4d",
        "llama3_2_1b",
        "llama3_2_3b",
        "llama3_8b",
    }
    promised |= {"llama3_8b_128k", "llama3_70b", "llama3_70b_3d", "llama3_70b_4d"}
    promised |= {"llama3_405b", "llama3_405b_2d", "llama3_405b_4d"}
    promised |= {"llama3_8b_float8", "llama3_70b_float8", "llama3_405b_float8"}
    tuned = (
        "smollm2_135m",
        "smollm2_135m_lora",
        "llama3_2_1b",
        "llama3_2_3b",
        "llama3_8b",
        "llama3_8b_1gpu",
        "llama3_8b_lora",
        "llama3_8b_qlora",
        "llama3_8b_128k",
        "llama3_8b_128k_lora",
    )
    promised |= {f"finetune_{name}" for name in tuned}
    assert promised == {path.stem for path in CONFIGS}


def table_rows() -> dict[str, list[str]]:
    """The table of configs in the documentation: GPUs, mesh and length by file."""
    text = (ROOT / "docs" / "guides" / "launching.md").read_text()
    rows = re.findall(r"^\| (`.*\.toml`) \|(.*)\|$", text, re.MULTILINE)
    return {
        name: [cell.strip() for cell in cells.split("|")]
        for names, cells in rows
        for name in re.findall(r"`(\w+)\.toml`", names)
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_documentation_has_the_degrees(path: Path):
    gpus, mesh, seq_len = table_rows()[path.stem]
    config = load_toml(path)
    assert int(seq_len) == config.training.seq_len
    sizes = stated(path)
    if path.stem in ("debug_model", "debug_mixture", "debug_validation"):
        return
    assert set(re.findall(r"\d+", gpus)) == {str(size) for size in sizes}
    section = config.parallelism
    degrees = {
        "tp": section.tensor_parallel_degree,
        "cp": section.context_parallel_degree,
        "pp": section.pipeline_parallel_degree,
    }
    degrees["dp"] = max(sizes) // math.prod(degrees.values())
    said = {axis: int(degree) for axis, degree in re.findall(r"(\w+) (\d+)", mesh)}
    assert said == {axis: degree for axis, degree in degrees.items() if degree > 1}


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch):
    assert check(ROOT / "train_configs" / "llama3_8b.toml", "7", monkeypatch) == 2
