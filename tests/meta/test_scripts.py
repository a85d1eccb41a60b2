"""The launch scripts: which Python they take, what they do with a .venv, how they start a run.

They run in a copy of the clone. Nothing is installed: pip is told that there is no index, so an
installation that would start fails at once.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ["run_llama_train.sh", "run_tests.sh", "scripts", "pyproject.toml", "constraints.txt"]
COPIED += ["torchtitan", "train_configs", "multinode_trainer.slurm", "README.md", "LICENSE"]
MARK = ".venv/.torchtitan"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"  # with a space in it
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, folder / name)
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder first in PATH, for programs that stand in for others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def python_of_tests(folder: Path, clone: Path | None, setting: str = "") -> None:
    """`python3` and `python` are the tests' interpreter, with the package of `clone` if given."""
    setting += f'export PYTHONPATH="{clone}"' if clone else "unset PYTHONPATH"
    for name in ("python3", "python"):
        program(folder, name, f'{setting}\nexec "{sys.executable}" "$@"')


def run(clone: Path, programs: Path, *command: str, **environment: str):
    """The finished process. PATH holds the stand-ins and the system's own programs only."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NGPU", "CONFIG_FILE")}
    return subprocess.run(
        command,
        cwd=clone.parent,
        env={**kept, "PATH": f"{programs}:/usr/bin:/bin", "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


NO_PIP = 'if [[ "$1 $2" == "-m venv" ]]; then set -- "$@" --without-pip; fi\n'
"""Making a .venv takes seconds with pip, and no installation follows in these tests."""


def test_an_active_environment_with_this_clone_is_used(clone: Path, programs: Path):
    """For a check, which is one process, however many it is for."""
    python_of_tests(programs, clone)
    result = run(clone, programs, str(clone / "run_llama_train.sh"), "--check", NGPU="64")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok: llama3 debugmodel on 64 processes")
    assert not (clone / ".venv").exists()


def test_a_dry_run_is_one_process(clone: Path, programs: Path):
    python_of_tests(programs, clone)
    arguments = ["--comm.mode", "fake_backend"]
    result = run(clone, programs, str(clone / "run_llama_train.sh"), *arguments, NGPU="64")
    assert result.returncode == 0, result.stderr
    assert "rank 0" in result.stdout
    assert "64: dp_shard 64" in result.stdout


def test_an_environment_with_another_clone_is_not_used(clone: Path, programs: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(clone, other)
    python_of_tests(programs, other, NO_PIP)
    result = run(clone, programs, str(clone / "run_llama_train.sh"), "--check")
    assert result.returncode == 1
    assert "Installing torchtitan" in result.stderr
    assert "The installation failed" in result.stderr
    assert (clone / MARK).read_text() == "installing\n"


def test_a_half_made_venv_is_made_anew(clone: Path, programs: Path):
    python_of_tests(programs, None, NO_PIP)
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "rest-of-the-last-time").touch()
    (clone / MARK).write_text("installing\n")
    result = run(clone, programs, str(clone / "run_llama_train.sh"))
    assert "Making .venv anew" in result.stderr
    assert not (clone / ".venv" / "rest-of-the-last-time").exists()


def ready_venv(clone: Path, mark: str | None) -> None:
    """A .venv that runs the clone, without having been installed."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    python_of_tests(clone / ".venv" / "bin", clone)
    if mark is not None:
        (clone / MARK).write_text(mark)


def requirements_sum(clone: Path, programs: Path) -> str:
    ask = "source scripts/setup_env.sh; requirements_sum"
    return run(clone, programs, "bash", "-c", f"cd '{clone}'; {ask}").stdout.strip()


def test_a_finished_venv_is_used(clone: Path, programs: Path):
    program(programs, "python3", "exit 1")
    ready_venv(clone, f"{requirements_sum(clone, programs)} \n")
    result = run(clone, programs, str(clone / "run_llama_train.sh"), "--help")
    assert result.returncode == 0, result.stderr
    assert "Installing" not in result.stderr


def test_a_venv_of_older_requirements_is_installed_again(clone: Path, programs: Path):
    python_of_tests(programs, None)
    ready_venv(clone, f"{requirements_sum(clone, programs)} \n")
    with (clone / "constraints.txt").open("a") as file:
        file.write("something==1.0\n")
    result = run(clone, programs, str(clone / "run_llama_train.sh"), "--check")
    assert "Installing torchtitan" in result.stderr
    assert "anew" not in result.stderr
    assert (clone / MARK).read_text() == "installing\n"


def test_a_venv_for_training_gets_the_extra_for_tests(clone: Path, programs: Path):
    python_of_tests(programs, None)
    ready_venv(clone, f"{requirements_sum(clone, programs)} \n")
    assert "Installing" in run(clone, programs, str(clone / "run_tests.sh"), "--version").stderr


def test_a_venv_made_by_hand_is_never_changed(clone: Path, programs: Path):
    python_of_tests(programs, None)
    (clone / ".venv" / "bin").mkdir(parents=True)
    program(clone / ".venv" / "bin", "python", "exit 1")
    before = sorted(path.name for path in (clone / ".venv").rglob("*"))
    result = run(clone, programs, str(clone / "run_llama_train.sh"))
    assert result.returncode == 1
    assert "made by hand" in result.stderr
    assert sorted(path.name for path in (clone / ".venv").rglob("*")) == before


def test_an_old_python_is_refused_with_a_sentence(clone: Path, programs: Path):
    names = ["python3", "python", *(f"python3.{minor}" for minor in range(10, 15))]
    for name in names:
        program(programs, name, 'if [[ $1 == --version ]]; then echo "Python 3.9.18"; fi; exit 1')
    result = run(clone, programs, str(clone / "run_llama_train.sh"))
    assert result.returncode == 1
    assert result.stderr.startswith("Python 3.10 or newer is needed")
    assert "Python 3.9.18" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_ensurepip_one_sentence_says_what_to_install(clone: Path, programs: Path):
    blocked = clone.parent / "without_ensurepip"
    blocked.mkdir()
    (blocked / "ensurepip.py").write_text("raise ModuleNotFoundError('ensurepip')")
    for name in ("python3", "python"):
        program(programs, name, f'export PYTHONPATH="{blocked}"\nexec "{sys.executable}" "$@"')
    result = run(clone, programs, str(clone / "run_llama_train.sh"))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert result.returncode == 1
    assert f"sudo apt install python{version}-venv" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (clone / ".venv").exists()


PASSES = 'if [[ "$*" == *--check* ]]; then exit 0; fi\n'
"""A check of the config that passes at once; a real one takes seconds."""


def echoing_python(programs: Path, clone: Path, check: str = "") -> None:
    """A `python3` that says what it would train with, and answers everything else truthfully."""
    program(
        programs,
        "python3",
        'if [[ "$*" == *torchtitan.train* ]]; then printf "%s\\n" "$PWD" "LOG_RANK=$LOG_RANK" "$@";'
        f' exit; fi\n{check}export PYTHONPATH="{clone}"\nexec "{sys.executable}" "$@"',
    )


def test_one_process_needs_no_torchrun(clone: Path, programs: Path):
    echoing_python(programs, clone)
    script = str(clone / "run_llama_train.sh")
    result = run(clone, programs, script, "--job.description", "two words", NGPU="1")
    folder, log_rank, *arguments = result.stdout.splitlines()
    assert (folder, log_rank) == (str(clone.parent), "LOG_RANK=0"), "paths start where one stands"
    assert arguments[:2] == ["-m", "torchtitan.train"]
    assert arguments[2:4] == ["--job.config_file", f"{clone}/train_configs/debug_model.toml"]
    assert arguments[4:] == ["--job.description", "two words"]


def test_several_processes_start_through_torchrun(clone: Path, programs: Path):
    echoing_python(programs, clone, PASSES)
    (clone.parent / "mine.toml").write_text('training.dataset = "stdlib"\n')
    script = str(clone / "run_llama_train.sh")
    result = run(clone, programs, script, NGPU="2", LOG_RANK="1", CONFIG_FILE="mine.toml")
    _, log_rank, *arguments = result.stdout.splitlines()
    assert log_rank == "LOG_RANK=1"
    assert arguments[:4] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    assert "localhost:0" in arguments
    assert arguments[-2:] == ["--job.config_file", "mine.toml"]


def test_a_mistake_under_several_processes_is_told_once(clone: Path, programs: Path):
    echoing_python(programs, clone)
    arguments = ["--training.stepz", "3", "--checkpoint.enable"]
    result = run(clone, programs, str(clone / "run_llama_train.sh"), *arguments, NGPU="2")
    assert (result.returncode, result.stdout) == (2, ""), "nothing was started"
    assert result.stderr.count("--training.stepz: is unknown") == 1
    first, *rest = result.stderr.splitlines()
    assert first == "Checking the run for 2 processes ..." and len(rest) == 2


def test_a_path_that_starts_in_the_clone_is_named(clone: Path, programs: Path):
    """Paths start where one stands, which here is the folder above the clone."""
    python_of_tests(programs, clone)
    script = str(clone / "run_llama_train.sh")
    data = ["--training.dataset", "auto", "--training.dataset_path", "torchtitan/data"]
    result = run(clone, programs, script, "--check", *data)
    assert result.returncode == 9
    assert f"did you mean {clone}/torchtitan/data?" in result.stderr
    assert "not found here, so not checked: training.dataset_path; else ok: " in result.stdout


def test_standing_in_another_clone_is_refused(clone: Path, programs: Path):
    """Python would take the code from there."""
    python_of_tests(programs, clone)
    (clone.parent / "torchtitan").mkdir()
    (clone.parent / "torchtitan" / "train.py").touch()
    result = run(clone, programs, str(clone / "run_llama_train.sh"), "--check")
    assert result.returncode == 1
    assert result.stderr.startswith(f"{clone.parent} is another clone")


def test_a_number_of_processes_is_a_number(clone: Path, programs: Path):
    echoing_python(programs, clone)
    result = run(clone, programs, str(clone / "run_llama_train.sh"), NGPU="two")
    assert result.returncode == 1
    assert result.stderr.startswith("NGPU = two")


def test_run_tests_passes_its_arguments_to_pytest(clone: Path, programs: Path):
    python_of_tests(programs, clone)
    result = run(clone, programs, str(clone / "run_tests.sh"), "--version")
    assert result.returncode == 0, result.stderr
    assert "pytest" in result.stdout


def slurm(programs: Path, clone: Path, training: str, check: str = PASSES) -> None:
    """Stand-ins for Slurm's programs on one node, and `training` in place of torchrun."""
    program(programs, "scontrol", f'echo "$@" >>"{clone}/scontrol.log"; echo node7')
    program(programs, "squeue", "echo RUNNING")
    program(programs, "srun", 'shift; exec "$@"')
    program(
        programs,
        "python3",
        f'if [[ "$*" == *distributed.run* ]]; then printf "%s\\n" "$@" >arguments; {training} fi\n'
        f'{check}export PYTHONPATH="{clone}"\nexec "{sys.executable}" "$@"',
    )


SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"}
SLURM |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
ON_STOP = (
    'mkdir -p "%s"; touch started; while [[ ! -e "%s/stop" ]]; do sleep 0.1; done;'
    ' echo "{\\"requeue\\": %s}" >"%s/run_status.json"; exit 1;'
)


def test_slurm_starts_one_torchrun_a_node(clone: Path, programs: Path):
    slurm(programs, clone, "exit 0;", check="")
    script = str(clone / "multinode_trainer.slurm")
    result = run(clone, programs, script, SLURM_SUBMIT_DIR=str(clone), **SLURM)
    assert result.returncode == 0, result.stderr
    arguments = (clone / "arguments").read_text().split()
    assert arguments[2:6] == ["--nnodes", "4", "--nproc_per_node", "8"]
    assert "node7:23456" in arguments
    assert "requeue" not in (clone / "scontrol.log").read_text()


def test_slurm_that_counts_no_gpus(clone: Path, programs: Path):
    """As where GPUs are no resource of Slurm's: those that torch sees are taken, not one."""
    slurm(programs, clone, "exit 0; fi; if [[ $2 == *device_count* ]]; then echo 4; exit;")
    script = str(clone / "multinode_trainer.slurm")
    environment = SLURM | {"SLURM_GPUS_ON_NODE": "", "SLURM_SUBMIT_DIR": str(clone)}
    result = run(clone, programs, script, **environment)
    assert result.returncode == 0, result.stderr
    assert (clone / "arguments").read_text().split()[4:6] == ["--nproc_per_node", "4"]


def test_slurm_starts_nothing_with_a_bad_config(clone: Path, programs: Path):
    slurm(programs, clone, "exit 0;", check="")
    script = str(clone / "multinode_trainer.slurm")
    arguments = ["--training.local_batch_size", "0"]
    result = run(clone, programs, script, *arguments, SLURM_SUBMIT_DIR=str(clone), **SLURM)
    assert result.returncode == 2
    assert "training.local_batch_size" in result.stderr
    assert not (clone / "arguments").exists()


def test_slurm_leaves_a_run_alone_whose_start_was_refused(clone: Path, programs: Path):
    """The status is that of the job before it; the next one would be refused again."""
    (clone / "outputs" / "one").mkdir(parents=True)
    (clone / "outputs" / "one" / "run_status.json").write_text('{"requeue": true}')
    slurm(programs, clone, "exit 1;")
    script = str(clone / "multinode_trainer.slurm")
    arguments = ["--job.dump_folder", str(clone / "outputs" / "one")]
    result = run(clone, programs, script, *arguments, SLURM_SUBMIT_DIR=str(clone), **SLURM)
    assert result.returncode == 1, result.stderr
    assert "requeue" not in (clone / "scontrol.log").read_text()


@pytest.mark.parametrize(("requeue", "folder"), [("true", "~/$RUNS/one"), ("false", "outputs/one")])
def test_slurm_queues_a_run_again_that_a_signal_stopped(
    clone: Path, programs: Path, requeue: str, folder: str
):
    run_folder = str(clone / folder.replace("~/$RUNS", "home/my runs"))
    slurm(programs, clone, ON_STOP % (run_folder, run_folder, requeue, run_folder))
    environment = {**os.environ, **SLURM, "SLURM_SUBMIT_DIR": str(clone)}
    environment |= {"HOME": str(clone / "home"), "RUNS": "my runs"}
    environment["PATH"] = f"{programs}:/usr/bin:/bin"
    command = [clone / "multinode_trainer.slurm", "--job.dump_folder", folder]
    script = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (clone / "started").exists():
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=60) == 1
    assert ("requeue 123456" in (clone / "scontrol.log").read_text()) == (requeue == "true")
