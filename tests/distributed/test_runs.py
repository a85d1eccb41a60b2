"""Whole runs: the same on other meshes, after a kill, after a request to stop; and how they end."""

import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.forked import ForkedRun, execute


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.run(folder)
    return folder


def start_and_signal(folder: Path, number: int, *arguments: str) -> str:
    """Start a run, send it a signal once step 5 is logged, return what it said."""
    with closing(ForkedRun(runs.command(folder, *arguments), runs.environment())) as process:
        wait_for_step(folder, 5, process)
        process.send_signal(number)
        done = process.wait(60)
    return done.stdout + done.stderr


def wait_for_step(folder: Path, step: int, process: ForkedRun | subprocess.Popen[str]) -> None:
    """Until so many steps are logged."""
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, f"the run did not get to step {step}"
        time.sleep(0.005)


def test_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    rows = runs.records(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["num_tokens_seen"] == 10 * 8 * 32
    steps = sorted(path.name for path in (uninterrupted / "checkpoint").glob("step-*"))
    assert steps == ["step-10", "step-4", "step-8"]
    assert runs.status(uninterrupted)["status"] == "completed"
    assert (uninterrupted / "config.toml").is_file()


def test_same_command_again_says_finished(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = runs.run(uninterrupted)
    assert "finished" in done.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


COPIES = "--parallelism.data_parallel_replicate_degree=2"
TENSOR, CONTEXT, PIPELINE = (
    f"--parallelism.{kind}_parallel_degree=2" for kind in ("tensor", "context", "pipeline")
)


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, (COPIES,)),
        (4, (COPIES, "--training.local_batch_size=1")),
    ],
    ids=["ddp", "hsdp"],
)
def test_other_mesh_same_run(
    processes: int, arguments: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    """The other axes are in `test_resume_on_other_meshes_with_more_steps`."""
    runs.run(tmp_path / "run", *arguments, processes=processes)
    for (step, loss, norm), expected in zip(
        runs.curve(tmp_path / "run"), runs.curve(uninterrupted), strict=True
    ):
        assert step == expected[0]
        assert loss == pytest.approx(expected[1], rel=2e-6)
        assert norm == pytest.approx(expected[2], rel=2e-5)


@pytest.mark.fault("F01", "F32")
def test_kill_and_same_command_is_one_run(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run_killed(folder)
    assert runs.status(folder)["status"] == "running"
    done = runs.run(folder)
    assert "Resumed from step 4" in done.stderr
    assert runs.curve(folder) == runs.curve(uninterrupted)


@pytest.mark.fault("F13", "F15")
def test_request_to_stop_saves_the_step_and_leaves(uninterrupted: Path, tmp_path: Path) -> None:
    """With worker processes, which must not die of the signal before the run has saved."""
    folder = tmp_path / "run"
    long = "--training.steps=3000"
    workers = "--training.dataloader.num_workers=2"
    output = start_and_signal(folder, signal.SIGTERM, long, workers)
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("preempted", 7), output
    assert runs.records(folder)[-1]["step"] == status["step"]
    assert (folder / "checkpoint" / f"step-{status['step']}").is_dir()


@pytest.mark.fault("F13")
def test_ctrl_c_saves_and_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = start_and_signal(folder, signal.SIGINT, "--training.steps=3000")
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("preempted", 7), output
    assert (folder / "checkpoint" / f"step-{status['step']}").is_dir()


def test_request_to_stop_without_checkpoints_promises_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("--training.steps=3000", "--checkpoint.enable=false")
    output = start_and_signal(folder, signal.SIGTERM, *arguments)
    assert "Nothing is saved" in output
    assert "goes on" not in output


def test_clipping_limits_the_update(tmp_path: Path) -> None:
    """With a large epsilon Adam's update is in proportion to the gradient, so clipping shows."""
    curves = {}
    for name, arguments in {
        "still": ("--optimizer.lr=0",),
        "clipped": ("--optimizer.eps=1", "--training.max_norm=1e-6"),
        "free": ("--optimizer.eps=1", "--training.max_norm=inf"),
    }.items():
        common = ("--checkpoint.enable=false", "--optimizer.lr=10", "--optimizer.weight_decay=0")
        chosen = [a for a in common if a.partition("=")[0] not in "".join(arguments)]
        runs.run(tmp_path / name, *chosen, *arguments)
        curves[name] = [loss for _, loss, _ in runs.curve(tmp_path / name)]
    assert curves["clipped"] == pytest.approx(curves["still"], rel=1e-4)
    assert curves["free"][-1] < curves["still"][-1] - 0.05


def test_ranks_with_different_data_do_not_train(tmp_path: Path) -> None:
    """A file that each machine has for itself, and that is not the same on all."""
    row = '{"text": "a line of some length, to be read in its turn"}\n'
    machines = [tmp_path / f"machine-{rank}" for rank in range(2)]
    for rank, machine in enumerate(machines):
        machine.mkdir()
        (machine / "rows.jsonl").write_text(row * (400 + rank))
    arguments = ("--training.dataset=json", "--training.dataset_path=rows.jsonl")
    for process in runs.start_ranks(tmp_path / "run", *arguments, folders=machines):
        with closing(process):
            done = process.wait(60)
        assert done.returncode == 3, done.stderr
        assert "different data" in done.stderr


SLOW_TO_LOOK = """
import os, time
from torchtitan.preflight import checkpoint as checks

look = checks.check_environment

def look_slowly(context):
    time.sleep(1)  # the other rank has told nothing meanwhile
    return look(context)

checks.check_environment = look_slowly
"""


@pytest.mark.fault("F46", "F56")
def test_a_mistake_is_told_though_other_ranks_find_it_first(tmp_path: Path) -> None:
    """The launcher ends all ranks when one ends; only the first looks at files before it tells."""
    (tmp_path / "slow.py").write_text(SLOW_TO_LOOK)
    words = ("--job.custom_import=slow", "--model.args.n_heads=7")
    env = runs.environment() | {"TORCHELASTIC_RUN_ID": "none"}  # torchrun's
    env["PYTHONPATH"] += f":{tmp_path}"
    command = runs.command(tmp_path / "run", *words, processes=2)
    done = execute(command, env)
    assert done.returncode != 0
    assert done.stderr.count("error: model.args.n_heads") == 1, done.stderr


@pytest.mark.fault("F13")
def test_request_to_stop_reaches_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        runs.command(folder, "--training.steps=3000", processes=2),
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(folder, 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    status = runs.status(folder)
    assert status["status"] == "preempted", output
    assert (folder / "checkpoint" / f"step-{status['step']}").is_dir()


@pytest.mark.fault("F30", "F33")
def test_resume_on_other_meshes_with_more_steps(tmp_path: Path) -> None:
    """Three meshes, one after the other, the checkpoint being all that they have of each other."""
    folder = tmp_path / "run"
    constant = ("--lr_scheduler.decay_ratio=0", "--checkpoint.interval=2")
    runs.run(folder, "--training.steps=4", *constant, TENSOR, processes=2)
    done = runs.run(folder, "--training.steps=6", *constant, CONTEXT, PIPELINE, processes=4)
    assert "Resumed from step 4" in done.stderr
    done = runs.run(folder, "--training.steps=8", *constant, processes=2)
    assert "Resumed from step 6" in done.stderr
    alone = tmp_path / "alone"
    runs.run(alone, "--training.steps=8", *constant)
    for row, expected in zip(runs.records(folder), runs.records(alone), strict=True):
        assert row["step"] == expected["step"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)
        for count in ("num_targets", "num_tokens_seen"):
            assert row[count] == expected[count]


@pytest.mark.fault("F01")
def test_kill_of_the_last_stage(uninterrupted: Path, tmp_path: Path) -> None:
    """The first one notices soon, and the same command goes on."""
    folder = tmp_path / "run"
    processes = runs.start_ranks(folder, PIPELINE, folders=[tmp_path] * 2, killed_rank=1)
    try:
        done = processes[0].wait(60)
        assert done.returncode == 1, done.stderr
        assert runs.status(folder)["status"] == "failed"
    finally:
        for process in processes:
            process.close()
    done = runs.run(folder, PIPELINE, processes=2)
    assert "Resumed from step 4" in done.stderr
    for row, expected in zip(runs.curve(folder), runs.curve(uninterrupted), strict=True):
        assert row == pytest.approx(expected, rel=2e-5)


def test_observers_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run(
        folder,
        "--metrics.enable_tensorboard",
        "--profiling.enable_profiling",
        "--profiling.profile_freq=5",
        "--checkpoint.enable=false",
        "--training.dataloader.num_workers=2",
    )
    assert runs.curve(folder) == runs.curve(uninterrupted)
    assert list((folder / "tb" / "run").glob("events.*"))
    assert list((folder / "profile_trace").glob("iteration_5/*.json*"))


def test_compiled_run_has_the_same_losses(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert "the first step compiles" in runs.run(folder, "--model.handlers=compile").stderr
    for (_, loss, _), expected in zip(runs.curve(folder), runs.curve(uninterrupted), strict=True):
        assert loss == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.fault("F41")
def test_finite_data_end_on_all_ranks_at_once(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{"row " * (n % 7 + 1)}{n}"}}\n' for n in range(120)))
    arguments = ("--training.dataset=json", f"--training.dataset_path={data}", "--data.epochs=2")
    lanes = ("--data.lanes=4", "--training.steps=1000")
    curves = []
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        runs.run(folder, *arguments, *lanes, processes=processes)
        status = runs.status(folder)
        assert status["status"] == "data_exhausted"
        assert (folder / "checkpoint" / f"step-{status['step']}").is_dir()
        rows = runs.records(folder)
        curves.append([(row["num_targets"], row["loss"]) for row in rows])
    for row, expected in zip(*curves, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    # More of them, on one rank with small microbatches: the batch that is open is the run's.
    more = ("--data.epochs=3", "--training.global_batch_size=-1", "--training.local_batch_size=1")
    done = runs.run(folder, *arguments[:2], *more, *lanes)
    assert "data.epochs grows from 2 to 3" in done.stderr
    steps = [row["step"] for row in runs.records(folder)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1.4 * len(curves[0])
    assert runs.status(folder)["status"] == "data_exhausted"


@pytest.mark.fault("F34")
def test_non_finite_step_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = runs.run(folder, "--optimizer.lr=1e38", "--training.max_norm=inf", expect=5)
    assert "not finite" in done.stderr
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("failed", 5)
    assert not list((folder / "checkpoint").glob("step-*"))


@pytest.mark.fault("F38", "F40")
def test_one_rank_without_data_stops_all(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    good = '{"text": "a line of some length, to be read in its turn"}\n' * 400
    data.write_text(good + "not json\n" + good)
    started = time.monotonic()
    done = runs.run(
        tmp_path / "run",
        "--training.dataset=json",
        f"--training.dataset_path={data}",
        "--training.steps=500",
        processes=2,
        expect=1,  # torchrun's, whatever the processes' own
    )
    assert "rows.jsonl" in done.stderr
    assert runs.status(tmp_path / "run")["exit_code"] == 3
    assert time.monotonic() - started < 90, "the other rank waited for the time-out"
