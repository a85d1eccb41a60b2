"""TOMLs as users of TorchTitan's three releases have them: checked, run and converted unchanged."""

import json
import sys
from pathlib import Path

import pytest
from old_keys import COLUMNS, TOMLS

from tests.distributed import runs
from tests.forked import execute
from torchtitan.cli import main
from torchtitan.config.exit_codes import DONE, NOT_FOUND
from torchtitan.config.load import load_config, load_toml
from torchtitan.config.toml_file import read_toml

ROOT = Path(__file__).parents[3]
FILES = sorted(TOMLS.rglob("*.toml"))
WORLD_SIZES = {"debug_model": 1, "llama3_8b": 8, "llama3_70b": 256, "llama3_405b": 512}

files = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def leaves(table: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in table.items():
        name = prefix + key
        names += leaves(value, name + ".") if isinstance(value, dict) else [name]
    return names


def test_every_release_has_every_size():
    assert len(FILES) == len(COLUMNS) * len(WORLD_SIZES)
    assert {path.parent.name for path in FILES} == set(COLUMNS)


@files
def test_it_has_keys_of_its_release_only(path: Path):
    assert set(leaves(read_toml(path))) <= set(COLUMNS[path.parent.name])


@files
def test_it_passes_the_check_at_its_world_size(path: Path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", str(WORLD_SIZES[path.stem]))
    # Of what the larger ones read nothing is in the clone.
    expected = DONE if path.stem == "debug_model" else NOT_FOUND
    assert main(["train", str(path), "--check"]) == expected
    printed = capsys.readouterr()
    assert "ok: llama3 " in printed.out
    assert "is not a" not in printed.err
    told = [line for line in printed.err.splitlines() if line.startswith("notice: ")]
    assert any("today" in line for line in told) and "torchtitan config convert" in told[-1]


def test_only_rank_0_tells_what_keys_are_today(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [str(TOMLS / "v0.1.0" / "debug_model.toml"), "--check"]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    main(["train", *arguments])
    assert "notice: " not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    main(["train", *arguments])
    assert "notice: training.seed is debug.seed today\n" in capsys.readouterr().err


def test_a_run_counts_the_notices_that_a_check_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    path = str(TOMLS / "early_2025" / "llama3_8b.toml")
    main(["train", path, "--check"])
    checked = capsys.readouterr().err.count("is training.local_batch_size today")
    assert main(["train", path]) == 2  # its data are not here
    error = capsys.readouterr().err
    assert checked == 1 and "local_batch_size today" not in error
    assert "settings were read as today's; --check names them" in error


def test_shown_with_today_s_keys(capsys):
    path = TOMLS / "early_2025" / "llama3_8b.toml"
    assert main(["config", "show", str(path), "--training.batch_size", "4"]) == 0
    printed = capsys.readouterr()
    shown = {line.split(" ")[0]: line for line in printed.out.splitlines()}
    assert shown["local_batch_size"].startswith("local_batch_size = 4")
    assert shown["local_batch_size"].endswith("# command line")
    assert shown["implementation"].endswith(f"# {path}")
    assert shown["handlers"].startswith('handlers = ["compile"]')
    assert shown["handlers"].endswith(f"# {path}")
    assert "notice: --training.batch_size is training.local_batch_size today" in printed.err


def test_the_same_run_in_three_releases_is_the_same_config():
    """What the files of one size say in other words comes to the same."""
    configs = [load_toml(path) for path in FILES if path.stem == "debug_model"]
    assert {config.debug.seed for config in configs} == {7}
    assert {config.training.local_batch_size for config in configs} == {8}
    assert {config.lr_scheduler.warmup_steps for config in configs} == {2}
    assert {config.optimizer.implementation for config in configs} == {"foreach", "fused"}
    eights = [load_toml(path) for path in FILES if path.stem == "llama3_8b"]
    assert {config.model.handlers for config in eights} == {("compile",)}
    largest = {path.parent.name: load_toml(path) for path in FILES if path.stem == "llama3_405b"}
    assert largest["early_2025"].parallelism.pipeline_parallel_microbatch_size == 2
    assert len(largest["v0.1.0"].parallelism.pipeline_parallel_split_points) == 3


@files
def test_it_converts_to_today_s_keys(path: Path, tmp_path: Path, capsys):
    new = tmp_path / "new.toml"
    assert main(["config", "convert", str(path), str(new)]) == 0
    assert "comments were not carried over" in capsys.readouterr().out
    assert load_toml(new) == load_toml(path)
    assert load_config([str(new)]).notices == ()
    assert len(leaves(read_toml(new))) <= len(leaves(read_toml(path))) + 1  # model.handlers
    assert main(["config", "convert", str(path)]) == 0
    assert capsys.readouterr().out == new.read_text()


@pytest.mark.parametrize("release", COLUMNS)
def test_the_debug_run_runs(release: str, tmp_path: Path):
    """As in its release, but with shorter sequences, on the CPU, in a folder of the test's.

    The early one is profiled, here too late: a warning, told once.
    """
    folder = tmp_path / "run"
    run = execute(
        [
            *(sys.executable, "-m", "torchtitan.train"),
            *("--job.config_file", str(TOMLS / release / "debug_model.toml")),
            *("--job.dump_folder", str(folder), "--training.seq_len", "16", "--job.device", "cpu"),
            *("--profiling.profile_freq", "11"),
        ],
        env=runs.environment(),
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("warning: profiling.profile_freq") == (release == "early_2025")
    assert json.loads((folder / "run_status.json").read_text())["status"] == "completed"
    assert list((folder / "tb").rglob("*tfevents*"))
    stored = load_config([str(folder / "config.toml")])
    assert stored.notices == () and stored.config.training.steps == 10
