"""`torchtitan replay` of real runs: the same bits on the same mesh, rounding on another one."""

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.distributed import runs
from tests.distributed.test_non_finite_steps import INJECTOR, W2
from tests.distributed.test_preference_runs import DPO, START, write_pairs, write_start
from tests.forked import execute
from torchtitan.checkpoint.steps_folder import step_folders
from torchtitan.cli import main
from torchtitan.commands.replay import new_folder
from torchtitan.commands.replay_report import bound_of
from torchtitan.config.load import load_config
from torchtitan.training import replay
from torchtitan.training.step_record import read_records
from torchtitan.utils.processes import StopRequested

RECORD = ("--debug.record=1", "--data.ledger=true")
IN_FLOAT64 = [
    f"--training.{key}=float64"
    for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce")
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on two ranks, which has saved steps 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    runs.run(folder, *RECORD, *IN_FLOAT64, "--training.max_norm=0.1", processes=2)
    return folder


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replays in forked processes; returns what they write to stderr."""
    texts: list[str] = []

    def run_words(words: Sequence[str]) -> int:
        done = execute(words, env=os.environ | runs.environment())
        texts.append(done.stderr)
        return done.returncode

    monkeypatch.setattr(replay, "run_words", run_words)
    return texts


def report_of(capsys: pytest.CaptureFixture[str], *words: object, expect: int = 0) -> Any:
    """The report of `torchtitan replay WORDS`."""
    status = main(["replay", *map(str, words), "--json"])
    printed = capsys.readouterr()
    assert status == expect, printed.err + printed.out
    return json.loads(printed.out)


def content(folder: Path) -> dict[str, Any]:
    """Name, time and content of everything in a folder."""
    return {
        str(path): (
            path.stat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in sorted(folder.rglob("*"))
    }


def test_the_same_mesh_gives_the_same_bits(
    whole: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the newest checkpoint before the step, with nothing of the run changed."""
    before = content(whole)
    assert main(["replay", str(whole), "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 7, replayed from step-4 on dp_shard 2"
    assert lines[-3:] == [
        "gradients: 21 of 21 gradients equal bit for bit",
        "data:      the same rows",
        "result:    equal bit for bit",
    ]
    assert lines[1].startswith("loss:") and lines[1].endswith("; equal")
    assert content(whole) == before
    record = read_records(whole / "record.jsonl")[7]  # of the gradients before clipping
    norms = (digest.norm for digest in record.gradients.values())
    assert math.hypot(*norms) == pytest.approx(record.norm, rel=1e-12) and record.norm > 0.1


@pytest.mark.parametrize("mesh", ["tp=2", "tp=1", "dp_replicate=2,dp_shard=1", "pp=2"])
def test_another_mesh_differs_by_rounding(
    whole: Path, mesh: str, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--parallelism.pipeline_parallel_microbatch_size=1"] if mesh == "pp=2" else []
    report = report_of(capsys, whole, 8, "--mesh", mesh, *more)
    assert report["start"] == 4 and report["data"] is True
    assert report["bound"] < 1e-12
    assert report["gradients"]["all"] == 21
    assert max(report[name]["difference"] for name in ("loss", "grad_norm")) < report["bound"]
    assert report["gradients"]["largest"] < report["bound"]


def test_what_is_changed_is_found(
    whole: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that is a millionth larger, from the step after the checkpoint on."""
    report = report_of(capsys, whole, 3, "--optimizer.lr=0.00080000080", expect=1)
    assert report["start"] == 0 and report["result"] == "different"
    assert report["first_difference"]["step"] == 2
    assert report["gradients"]["largest"] > report["bound"]


def test_the_first_step_and_other_data(
    whole: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The initial weights are the run's; a step that was left out shows in the rows."""
    assert report_of(capsys, whole, 1)["result"] == "equal"
    report = report_of(capsys, whole, 1, "--data.skip=1", expect=1)
    assert report["data"] is False and report["result"] == "different"


def test_a_run_that_was_killed_and_went_on(
    tmp_path: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Records after the last checkpoint count until a start goes on from there."""
    folder = tmp_path / "run"
    runs.run_killed(folder, *RECORD)
    assert report_of(capsys, folder, 6)["result"] == "equal"
    runs.run(folder, "--debug.record=4", "--training.steps=12", processes=2)
    records = read_records(folder / "record.jsonl")
    assert list(records) == [1, 2, 3, 4, 8, 12]
    assert [records[step].start["mesh"]["dp_shard"] for step in (4, 8)] == [1, 2]
    # The first start had a shorter schedule, and one process.
    for step in (4, 12):
        assert report_of(capsys, folder, step)["result"] == "equal"


def test_a_step_that_was_only_logged(
    tmp_path: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run whose gradients are gone when they could be recorded."""
    folder = tmp_path / "run"
    in_backward = ["--optimizer.early_step_in_backward=true", "--training.max_norm=inf"]
    in_backward.append("--training.global_batch_size=2")
    runs.run(folder, "--training.steps=6", "--metrics.log_freq=3", *in_backward)
    report = report_of(capsys, folder, 3)
    assert report["gradients"] is None and report["data"] is None and report["result"] == "equal"
    assert report["loss"]["difference"] == report["grad_norm"]["difference"] == 0
    assert main(["replay", str(folder), "5"]) == 2
    assert "which has none, nor logged" in capsys.readouterr().err


def test_a_run_with_a_reference(
    tmp_path: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference stays that of the start, not the weights of the checkpoint."""
    write_start(tmp_path / "hf")
    words = (*DPO, *START, write_pairs(tmp_path / "pairs.jsonl"), "--training.steps=6")
    words += (f"--checkpoint.initial_load_path={tmp_path / 'hf'}", "--debug.record=1")
    runs.run(tmp_path / "run", *words)
    report = report_of(capsys, tmp_path / "run", 6)
    assert (report["start"], report["result"]) == (4, "equal")


def test_a_config_that_went_back_or_made_a_seed_trains() -> None:
    """In a new folder, which has no step to go back to."""
    words = ["--checkpoint.enable", "--checkpoint.load_step=3", "--checkpoint.allow_rewind"]
    words.append("--checkpoint.create_seed_checkpoint")
    section = replay.quiet(load_config(words).config, 2).checkpoint
    assert (section.load_step, section.allow_rewind) == (-1, False)
    assert section.create_seed_checkpoint is False


def test_a_spike_that_ends_a_run_is_finite(
    tmp_path: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    spikes = ["--training.on_loss_spike=skip", "--training.max_skipped_steps=1"]
    spikes += ["--training.loss_spike_threshold=0.5", "--training.loss_spike_window=16"]
    spikes += ["--training.steps=60", "--optimizer.lr=0.3", "--checkpoint.interval=1000"]
    runs.run(folder, *spikes, expect=5)
    [step] = re.findall(r"step (\d+): the loss .* is a spike", runs.status(folder)["error"])
    assert main(["replay", str(folder), step]) == 0
    printed = capsys.readouterr().out
    assert f"result:    equal, as far as it is known. step {step}: the loss" in printed
    assert main(["replay", str(folder), step, "--training.on_loss_spike=ignore"]) == 1


def test_the_bound_of_many_steps_still_finds_a_wrong_factor(tmp_path: Path) -> None:
    config = load_config([]).config
    prepared = replay.Prepared(config, config, tmp_path, 0)
    assert bound_of(prepared, 1) < bound_of(prepared, 4) < bound_of(prepared, 10**4) < 0.5


def test_a_signal_ends_what_was_started(tmp_path: Path) -> None:
    """Before the temporary folder is removed, which ranks would write to again."""
    script = f"trap 'sleep 0.2; touch {tmp_path}/ended; exit' TERM; touch {tmp_path}/started\n"
    script += "while :; do sleep 0.05; done"

    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    with pytest.raises(StopRequested), new_folder(None) as folder:
        thread.start()
        replay.run_words(["sh", "-c", script], folder / "log")
    thread.join()
    assert (tmp_path / "ended").exists() and not folder.exists()


STATEFUL = (
    INJECTOR
    + """
    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def spoil_output(self, module, args, output):
        return output * float("nan") if self.due() else output
"""
)


def injected(folder: Path, *arguments: str) -> str:
    """Run on two ranks with a NaN at step 7 in layer 3's w2; returns the log."""
    words = ("--model.handlers=injector", "--job.custom_import=injector", "--model.args.n_layers=4")
    layer = ("--handlers.injector.layer=3", *RECORD, *arguments)
    done = execute(runs.command(folder, *words, *layer, processes=2), env=runs.environment())
    return done.stderr


@pytest.fixture
def injector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that spoils a value."""
    (tmp_path / "injector.py").write_text(STATEFUL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_step_that_is_not_finite_is_so_again(
    tmp_path: Path, injector: None, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the rank that it came from: stopped at once, named, not saved, and repeated."""
    folder = tmp_path / "run"
    log = injected(folder, "--handlers.injector.rank=1")
    assert "step 7: the loss or the gradient norm is not finite" in log
    where = f"{W2.replace('layers.1', 'layers.3')} 1 in sequence 4 of the step, which begins '"
    assert where in log
    assert runs.status(folder)["exit_code"] == 5
    assert step_folders(folder / "checkpoint") == [4]
    assert list(read_records(folder / "record.jsonl")) == list(range(1, 8))
    own = ("--device", "cpu", "--job.custom_import=injector")
    report = report_of(capsys, folder, 7, *own)
    assert report["not_finite"] == {"recorded": True, "replayed": True}
    assert report["result"] == "equal" and where in report["message"]
    # One process has no rank 1, which is where this fault is.
    report = report_of(capsys, folder, 7, *own, "--mesh", "tp=1", expect=1)
    assert report["not_finite"] == {"recorded": True, "replayed": False}


def test_a_fault_of_the_code_comes_back_on_every_mesh(
    tmp_path: Path, injector: None, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    injected(folder, "--handlers.injector.rank=0")
    words = ["--mesh", "tp=1", "--device", "cpu", "--job.custom_import=injector"]
    assert main(["replay", str(folder), "7", *words]) == 0
    printed = capsys.readouterr().out
    assert "result:    not finite again. step 7: the loss" in printed
    assert f"{W2.replace('layers.1', 'layers.3')} 0 in sequence" in printed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["11"], "the run has steps 1 to 10"),
        (["7", "--mesh", "qp=2"], "is no axis; the axes are pp, dp_replicate, dp_shard, cp, tp"),
        (["7", "--mesh", "dp_shard=3"], "training.global_batch_size"),
        (["7", "--mesh", "tp"], "--mesh"),
        (["7", "--keep", "."], "cannot be made"),
        (["7", "--training.setps", "3"], "training.setps"),
    ],
)
def test_what_cannot_be_replayed(
    whole: Path, words: list[str], text: str, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(whole), *words]) == 2
    assert text in capsys.readouterr().err
    assert forked == []


def test_no_run_and_no_launcher(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path), "1"]) == 2
    assert "holds no run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["replay", str(whole), "7"]) == 2
    assert "run it without a launcher" in capsys.readouterr().err


def test_stored_config_executes_nothing_and_points_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modules count on the command line alone; the run's store and its recorded step stay out."""
    (tmp_path / "planted.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_status.json").write_text('{"status": "failed", "step": 1}')
    stored = {
        "job": {"custom_import": ["planted"]},
        "checkpoint": {"enable": True, "remote_folder": "s3://bucket/run"},
        "debug": {"record_tensors": str(tmp_path / "tensors")},
    }
    (run / "config.toml").write_text(tomli_w.dumps(stored))
    assert main(["replay", str(run), "1"]) == 2
    assert "--job.custom_import=planted" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    config = replay.prepare(run, 1, tmp_path / "new", None, ["--job.custom_import=planted"]).config
    assert config.job.custom_import == ("planted",)
    assert config.checkpoint.remote_folder is None and config.debug.record_tensors is None


def test_the_folder_is_kept_and_can_be_trained_from(
    whole: Path, tmp_path: Path, forked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config is one like any other."""
    kept = tmp_path / "kept"
    report_of(capsys, whole, 5, "--keep", kept, "--mesh", "tp=1")
    assert [row["step"] for row in runs.records(kept)] == [5]
    again = ["train", str(kept / "replay.toml"), f"--job.dump_folder={tmp_path / 'again'}"]
    assert main([*again, "--check"]) == 0
    assert not (kept / "checkpoint").exists() or step_folders(kept / "checkpoint") == []
