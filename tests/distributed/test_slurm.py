"""multinode_trainer.slurm on a real Slurm, of three nodes on this machine."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.distributed.test_lost_ranks import ranks_of, wait_until
from tests.forked import launcher_variables
from torchtitan.data.ledger import read_ledger

PATIENCE = 300
"""Seconds: a start imports torch four times."""
STEPS = ("--training.steps=30", "--checkpoint.interval=2")
SLOW = """
import os, time
from torchtitan.checkpoint.run_folder import RunFolder

set_status, start = RunFolder.set_status, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def set_status_slowly(self, status, step, *arguments, **more):
    set_status(self, status, step, *arguments, **more)
    if status == "running" and start < 3:
        deadline = time.monotonic() + (60 if start == 2 and step >= 20 else 0.5)
        while time.monotonic() < deadline and not (self.path / "stop").exists():
            time.sleep(0.05)


RunFolder.set_status = set_status_slowly
"""
"""Rank 0 waits after each save, in all starts but the last: in the one before for the stop file,
as Slurm looks at time limits twice a minute."""


class Cluster:
    """The nodes, and the jobs on them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._env = runs.environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._env["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"

    def control(self, word: str) -> None:
        """Call the script that starts and stops the daemons."""
        script = runs.ROOT / "scripts" / "slurm_test_cluster.sh"
        # Daemons would keep a pipe of the output open.
        subprocess.run([script, word, self._folder], env=self._env, check=True, timeout=60)

    def call(self, *words: str, **env: str) -> str:
        """The output of one of Slurm's programs."""
        done = subprocess.run(
            words, env=self._env | env, cwd=runs.ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *words: str, **env: str) -> str:
        return self.call("sbatch", "--parsable", *words, **env)

    def wait_for(self, job: str, state: str) -> None:
        question = ("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
        wait_until(lambda: self.call(*question) == state, PATIENCE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    programs = ("slurmctld", "slurmd", "munged", "sbatch")
    if os.getuid() or not all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in programs):
        pytest.skip("needs root and Slurm: scripts/slurm_test_cluster.sh install")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.control("start")
        yield cluster
    finally:
        cluster.control("stop")


@pytest.mark.fault("F13", "F16")
@pytest.mark.timeout(1600)
def test_a_job_survives_preemption_a_lost_node_and_its_time_limit(
    cluster: Cluster, tmp_path: Path
) -> None:
    """One job, as each start takes long. Its losses are those of a run that nothing happened to."""
    whole, folder, output = tmp_path / "whole", tmp_path / "run", tmp_path / "output"
    runs.run(whole, *STEPS, processes=2)
    (tmp_path / "slow.py").write_text(SLOW)
    options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={output}"]
    job = cluster.submit(
        "--nodes=2",
        *options,
        "multinode_trainer.slurm",
        f"--job.dump_folder={folder}",
        "--job.custom_import=slow",
        *STEPS,
        CONFIG_FILE=str(tmp_path / "config.toml"),
        NGPU="1",
        PYTHONPATH=f"{tmp_path}:{runs.ROOT}",
    )

    step = 0

    def train_on() -> None:
        """Wait until this start has saved twice."""
        nonlocal step
        wait_until(lambda: status().get("step", 0) > step + 3, PATIENCE)
        step = status()["step"]

    def status() -> dict[str, Any]:
        return runs.status(folder) if (folder / "run_status.json").exists() else {}

    def ended() -> dict[str, Any]:
        wait_until(lambda: status()["status"] != "running", PATIENCE)
        return status()

    train_on()
    cluster.submit("--nodes=3", "--partition=urgent", "--output=/dev/null", "--wrap=true")
    assert (ended()["status"], ended()["exit_code"]) == ("preempted", 7), output.read_text()
    assert (folder / "checkpoint" / f"step-{ended()['step']}").is_dir()

    cluster.wait_for(job, "PENDING")
    train_on()
    cluster.control("lose")
    assert (ended()["status"], ended()["requeue"]) == ("failed", True), output.read_text()

    cluster.wait_for(job, "PENDING")
    train_on()  # on another node
    # The script asks for its signal five minutes before the end, which is now.
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    assert (ended()["status"], ended()["exit_code"]) == ("preempted", 7), output.read_text()
    assert "Asked to stop by the file" in output.read_text()

    cluster.wait_for(job, "PENDING")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    cluster.wait_for(job, "COMPLETED")
    assert runs.status(folder)["status"] == "completed"
    assert runs.curve(folder) == runs.curve(whole)


@pytest.mark.nightly
@pytest.mark.timeout(1500)
@pytest.mark.fault("F01", "F13", "F30", "F32")
def test_one_ledger_through_meshes_signals_kills_and_a_preemption(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Each start on another mesh, and ended in another way."""
    whole, folder, output = tmp_path / "whole", tmp_path / "run", tmp_path / "output"
    words = (*STEPS, "--data.ledger=true")
    runs.run(whole, *words)
    (tmp_path / "slow.py").write_text(SLOW)
    slow = (*words, "--job.custom_import=slow")
    path = {"PYTHONPATH": f"{tmp_path}:{runs.environment()['PYTHONPATH']}"}

    def status() -> dict[str, Any]:
        return runs.status(folder) if (folder / "run_status.json").exists() else {}

    def end_of(number: int, count: int, *arguments: str) -> dict[str, Any]:
        """The status of a start that was sent a signal after two saves."""
        step = status().get("step", 0)
        variables = [place | path for place in launcher_variables(count)]
        with ranks_of(folder, [(*slow, *arguments)] * count, variables) as ranks:
            wait_until(lambda: status().get("step", 0) > step + 3, PATIENCE)
            os.kill(ranks[-1].process.pid, number)
            for rank in ranks:
                rank.end(PATIENCE)
        return status()

    assert end_of(signal.SIGTERM, 4)["status"] == "preempted"
    tensor = "--parallelism.tensor_parallel_degree=2"
    assert end_of(signal.SIGKILL, 4, tensor)["status"] == "failed"

    step = status()["step"]
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--nodes=1", f"--output={output}"]
    options += ["multinode_trainer.slurm", f"--job.dump_folder={folder}", *slow]
    env = path | {"CONFIG_FILE": str(tmp_path / "config.toml"), "NGPU": "1"}
    job = cluster.submit(*options, **env)
    wait_until(lambda: status().get("step", 0) > step + 3, PATIENCE)
    cluster.submit("--nodes=3", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 600")
    wait_until(lambda: status()["status"] == "preempted", PATIENCE)
    cluster.call("scancel", "--full", job)
    assert status()["step"] < 30

    runs.run(folder, *words, processes=2)
    starts = {path.name.partition(".")[0] for path in (folder / "ledger").iterdir()}
    assert len(starts) == 4
    assert read_ledger(folder) == read_ledger(whole)
    for row, expected in zip(runs.curve(folder), runs.curve(whole), strict=True):
        assert row == pytest.approx(expected, rel=2e-5)
