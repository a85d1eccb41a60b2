"""`torchtitan bisect` of real runs; tests/parity/test_bisect_finds.py has the mistakes it finds."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import runs
from tests.forked import execute
from torchtitan.cli import main
from torchtitan.commands import bisect_sides

CONFIG = """
[model]
tokenizer_path = "bytes"
args = {dim = 32, n_layers = 2, n_heads = 4, n_kv_heads = 2}
[training]
dataset = "stdlib"
seq_len = 32
steps = 6
local_batch_size = 4
[lr_scheduler]
warmup_steps = 2
[job]
device = "cpu"
"""

FROZEN = """--model.handlers freeze --handlers.freeze.patterns '["layers.0.*"]' """


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sides train in forked processes; returns the interpreters that the user asked for."""
    pythons: list[str] = []

    def run_words(words: Sequence[str], log: Path) -> int:
        pythons.append(words[0])
        done = execute([sys.executable, *words[1:]], env=os.environ | runs.environment())
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(bisect_sides, "run_words", run_words)
    return pythons


def report_of(capsys: pytest.CaptureFixture[str], *words: object, expect: int) -> Any:
    """The report of `torchtitan bisect WORDS`."""
    status = main(["bisect", *map(str, words), "--json"])
    printed = capsys.readouterr()
    assert status == expect, printed.err + printed.out
    return json.loads(printed.out, parse_constant=pytest.fail)


def first_of(report: Any) -> tuple[str, str]:
    """The phase and the name of the first difference."""
    return report["differences"][0]["phase"], report["differences"][0]["name"]


def test_a_mesh_a_handler_and_an_interpreter(
    config: Path, tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A recorded side is not trained again, and a batch that is left open is that of A."""
    kept, python = tmp_path / "kept", tmp_path / "python"
    other = f"{config} --mesh dp_shard=2 --python {python}"
    report = report_of(capsys, config, other, "--keep", kept, expect=0)
    assert started == [sys.executable, str(python)]
    assert report["counts"]["forward"] > 20 and report["skipped"] == []
    one = kept / "A" / "tensors"
    report = report_of(capsys, one, f"{config} {FROZEN}", expect=1)
    assert first_of(report) == ("gradient norm", "gradient norm")
    assert "gradients: layers.0.attention.wq.weight" in report["skipped"]
    assert len(started) == 3
    spoiled = tmp_path / "spoiled"
    shutil.copytree(one, spoiled)
    entries = json.loads((spoiled / "backward-0.json").read_text())["entries"]
    entry = next(entry for entry in entries if entry["phase"] == "forward")
    tensors = load_file(spoiled / entry["file"])
    tensors[entry["key"]][0, 0, 0] = torch.nan
    save_file(tensors, spoiled / entry["file"])
    report = report_of(capsys, one, spoiled, expect=1)
    assert first_of(report) == ("forward", entry["name"])
    assert report["differences"][0]["relative"] is report["differences"][0]["values"][1] is None
    assert report["counts"]["parameters"] > 20 and report["counts"]["loss"] == 0


def test_a_checkpoint(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another's weights by the config of the other side; one of them is changed."""
    seed = ["--checkpoint.enable=true", "--checkpoint.create_seed_checkpoint=true"]
    seed += [f"--job.dump_folder={tmp_path / 'run'}"]
    assert (
        execute(
            [sys.executable, "-m", "torchtitan.train", str(config), *seed],
            env=os.environ | runs.environment(),
        ).returncode
        == 0
    )
    exported, w1 = tmp_path / "hf", "model.layers.1.mlp.gate_proj.weight"
    assert main(["export", str(tmp_path / "run"), str(exported)]) == 0
    capsys.readouterr()
    load = f"--checkpoint.initial_load_path={tmp_path / 'run' / 'checkpoint' / 'step-0'}"
    load += " --checkpoint.initial_load_model_only=true --checkpoint.enable=true"
    side = f"{config} {load}"
    report_of(capsys, side, exported, expect=0)
    [file] = exported.glob("*.safetensors")
    tensors = load_file(file)
    tensors[w1][3, 4] += 0.5
    save_file(tensors, file, {"format": "pt"})
    report = report_of(capsys, side, exported, expect=1)
    assert first_of(report) == ("parameters", "layers.1.feed_forward.w1.weight")
    assert report["differences"][0]["index"] == {"row": 3, "column": 4}


def test_a_step_of_a_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its optimizer's state, in float64, on a mesh that the run did not have."""
    words = [f"--job.dump_folder={tmp_path / 'run'}", "--checkpoint.interval=4"]
    words += ["--checkpoint.enable=true"]
    assert (
        execute(
            [sys.executable, "-m", "torchtitan.train", str(config), *words],
            env=os.environ | runs.environment(),
        ).returncode
        == 0
    )
    side = f"{tmp_path / 'run'} --step 5"
    report_of(capsys, side, f"{side} --mesh tp=2", expect=0)
    report = report_of(capsys, side, f"{side} --optimizer.lr=1e-4", expect=1)
    assert report["differences"][0]["phase"] == "updated parameters"
    assert report["counts"]["gradients"] > 0 and report["counts"]["updated parameters"] == 0


def test_bfloat16_as_it_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounding is told from a mistake by the same step in float64."""
    side = f"{config} --training.mixed_precision_param bfloat16"
    report = report_of(capsys, side, f"{side} --mesh tp=2", "--as-is", expect=0)
    assert 1e-4 < report["largest"] < report["bound"] < 1
    report = report_of(capsys, side, f"{side} --model.norm_type layernorm", "--as-is", expect=1)
    assert first_of(report) == ("forward", "layers.0.attention_norm")


@pytest.mark.parametrize(
    ("sides", "text"),
    [
        (("CONFIG", "missing.toml"), "B = "),
        (("CONFIG --mesh xx=2", "CONFIG"), "xx"),
        (("CONFIG --step", "CONFIG"), "expected one argument"),
        (("CONFIG", "CONFIG --mesh tp=3"), "parallelism.tensor_parallel_degree = 3"),
        (("CONFIG", "CONFIG --training.dataset_path missing"), "training.dataset_path"),
        (("FOLDER", "CONFIG"), "is no run"),
        (("STEP", "STEP"), "no side has a config to train them with"),
    ],
)
def test_sides_that_cannot_be_trained(
    sides: tuple[str, str], text: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = config.parent / "weights" / "step-4"
    weights.mkdir(parents=True)
    (weights / "manifest.json").touch()
    words = list(sides)
    for name, path in {"CONFIG": config, "FOLDER": config.parent, "STEP": weights}.items():
        words = [word.replace(name, str(path)) for word in words]
    assert main(["bisect", *words]) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert "training A" not in printed, "that takes time, and what is wrong with B is known"


def test_the_report_in_words(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal bits are said to be equal, and a phase of one tensor is named once."""
    assert main(["bisect", str(config), f"{config} {FROZEN}"]) == 1
    first, before, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("first difference: gradient norm: ")
    assert before.startswith("everything before it agrees exactly (")
    assert before.endswith(" gradients); rounding explains up to 1e-09")
