"""The datasets that docs/datasets.md shows how to write, trained on as it says."""

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.distributed import runs
from tests.distributed.test_runs import wait_for_step

PAGE = (runs.ROOT / "docs" / "datasets.md").read_text("utf-8")
SECTION = PAGE.partition("## A dataset of one's own")[2]
WALKS = ["--training.dataset=walks", "--checkpoint.interval=6", "--training.steps=30"]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    assert found
    return found[1]


def test_example_trains_and_goes_on_after_a_kill(tmp_path: Path):
    (tmp_path / "my_data.py").write_text(block("python"))
    # The page's TOML in that of the tests' runs.
    tables = '[training]\ndataset = "stdlib"\n'
    assert tables in runs.CONFIG
    toml = runs.CONFIG.replace(tables, block("toml"))
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])

    def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
        words = runs.command(folder, *arguments)
        (tmp_path / "config.toml").write_text(toml)  # `command` has written its own
        return subprocess.Popen(
            words,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return output

    sums, whole, killed = (tmp_path / name for name in ("sums", "whole", "killed"))
    finish(start(sums, "--training.steps=3"))
    assert len(runs.curve(sums)) == 3
    finish(start(whole, *WALKS))
    process = start(killed, *WALKS)
    wait_for_step(killed, 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert "resum" in finish(start(killed, *WALKS)).lower()
    assert runs.curve(killed) == runs.curve(whole) and len(runs.curve(whole)) == 30
