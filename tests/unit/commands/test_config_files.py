"""`torchtitan config copy | convert` and `torchtitan list configs`."""

import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from torchtitan.cli import main
from torchtitan.commands import config as config_command
from torchtitan.config import shipped
from torchtitan.config.load import load_config
from torchtitan.config.shipped import shipped_configs
from torchtitan.optim.registry import OPTIMIZERS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def problem_of(capsys):
    """Return the output of a bad `torchtitan config` command."""

    def run(*arguments: str) -> str:
        assert main(["config", *arguments]) == 2
        return capsys.readouterr().err

    return run


def test_a_copy_is_the_shipped_file(tmp_path: Path, capsys):
    path = tmp_path / "mine.toml"
    assert main(["config", "copy", "llama3_8b", str(path)]) == 0
    text = shipped_configs()["llama3_8b"].read_text()
    assert path.read_text() == text.replace("train_configs/llama3_8b.toml", str(path))
    assert path.read_text().startswith(f"# CONFIG_FILE={path} ./run_llama_train.sh")
    assert f"CONFIG_FILE={path} ./run_llama_train.sh" in capsys.readouterr().out


def test_a_copy_in_a_folder_keeps_the_name(tmp_path: Path):
    main(["config", "copy", "debug_model.toml", str(tmp_path)])
    assert load_config([str(tmp_path / "debug_model.toml")]).config.training.steps == 200


def test_nothing_is_overwritten(tmp_path: Path, problem_of):
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nbatch_size = 3\n")
    assert "exists already" in problem_of("copy", "llama3_8b", str(path))
    assert "exists already" in problem_of("convert", str(path), str(path))
    assert path.read_text() == "[training]\nbatch_size = 3\n"


def test_what_cannot_be_written_is_told(tmp_path: Path, problem_of):
    path = str(tmp_path / "no" / "mine.toml")
    assert "cannot be written: No such file" in problem_of("copy", "llama3_8b", path)


def test_a_full_disk_leaves_no_part_of_a_config(tmp_path: Path, problem_of):
    path = tmp_path / "mine.toml"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        problem = problem_of("copy", "llama3_8b", str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large" in problem and not path.exists()


def test_a_wrong_name_is_told(problem_of):
    assert 'did you mean "llama3_70b"?' in problem_of("copy", "lama3_70b", "x.toml")
    assert "write `torchtitan config copy NAME FILE`" in problem_of("copy", "llama3_8b")
    assert "write `torchtitan config convert OLD.toml [NEW.toml]`" in problem_of("convert")


def test_a_package_without_configs_says_so(monkeypatch, tmp_path: Path, problem_of):
    monkeypatch.setattr(shipped, "CLONE", tmp_path)
    monkeypatch.setattr(config_command, "CLONE", tmp_path)
    monkeypatch.setattr(shipped.metadata, "files", lambda name: None)
    assert "lists no configs" in problem_of("copy", "llama3_8b", str(tmp_path / "x.toml"))


def test_an_installed_wheel_has_them(tmp_path: Path):
    """Built and unpacked as an installer does, without a clone near it."""
    wheel = build_wheel(tmp_path)
    site, prefix = tmp_path / "site", tmp_path / "prefix"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (data,) = site.glob("torchtitan-*.data")
    shutil.move(data / "data", prefix)
    # As an installer writes it: paths from the folder of packages to where the files have gone.
    (record,) = site.glob("torchtitan-*.dist-info/RECORD")
    record.write_text(record.read_text().replace(f"{data.name}/data/", "../prefix/"))

    def config(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "torchtitan.cli", "config", *arguments],
            env={**os.environ, "PYTHONPATH": str(site)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "torchtitan train mine.toml" in config("copy", "llama3_8b", "mine.toml")
    (tmp_path / "based.toml").write_text('base = "llama3_8b"\n')
    head = config("show", "based.toml").splitlines()[0]
    base = prefix / "share" / "torchtitan" / "train_configs" / "llama3_8b.toml"
    assert head == f"# based.toml, based on {base}"
    in_clone = shipped_configs()
    text = in_clone["llama3_8b"].read_text().replace("train_configs/llama3_8b.toml", "mine.toml")
    assert (tmp_path / "mine.toml").read_text() == text
    installed = (prefix / "share" / "torchtitan" / "train_configs").glob("*.toml")
    assert {path.stem for path in installed} == set(in_clone)


def build_wheel(folder: Path) -> Path:
    """In a copy of what it is built from, as building leaves folders behind."""
    clone = folder / "clone"
    for name in ("torchtitan", "train_configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_a_conversion_holds_what_the_file_says_and_no_more(tmp_path: Path, capsys):
    old = tmp_path / "old.toml"
    old.write_text(
        "# gone\n[training]\nbatch_size = 3\ncompile = true\n[experimental]\n"
        "pipeline_parallel_degree = 2\n[fault_tolerance]\nenable = false\n"
        "[model.args]\nn_layers = 2\n"
    )
    assert main(["config", "convert", str(old)]) == 0
    printed = capsys.readouterr()
    assert printed.out.split("\n\n", 1)[1] == (
        '[model]\nhandlers = [\n    "compile",\n]\n\n[model.args]\nn_layers = 2\n\n'
        "[training]\nlocal_batch_size = 3\n\n[parallelism]\npipeline_parallel_degree = 2\n"
    )
    assert printed.out.startswith("# old.toml with today's keys")
    assert "notice: training.batch_size is training.local_batch_size today" in printed.err
    assert "notice: left out, as nothing uses them: fault_tolerance.enable\n" in printed.err


def test_what_is_refused_is_not_converted(tmp_path: Path, problem_of):
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text("[fault_tolerance]\nenable = true\n")
    assert "does not have fault tolerance" in problem_of("convert", str(old), str(new))
    assert not new.exists()


def test_lists(capsys):
    for name, expected in (
        ("configs", "for 8 GPUs of 80 GB"),
        ("optimizers", "uses beta1, beta2, eps, implementation; settings: patterns"),
        ("tokenizers", "One token a byte"),
    ):
        assert main(["list", name]) == 0
        assert expected in capsys.readouterr().out
    main(["list", "optimizers"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(OPTIMIZERS)


def test_the_help_has_every_list(capsys):
    assert main(["list", "--help"]) == 0
    rows = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) > 5
    main(["list"])
    lists = [line for line in capsys.readouterr().out.splitlines() if line[:1] != " "]
    assert lists == [f"{name}:" for name in rows]


def test_every_shipped_config_is_listed_with_what_it_is_for(capsys):
    main(["list", "configs"])
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == list(shipped_configs())
    assert all(text.startswith("for ") for _, text in rows)
    texts = dict(rows)
    assert texts["debug_4d"] == "for a CPU (WORLD_SIZE=8): dp 1, tp 2, cp 2, pp 2"
    assert texts["finetune_llama3_8b_lora"] == "for 1 GPU of 48 GB (WORLD_SIZE=1)"
    assert texts["llama3_405b"].endswith("(3D)")
