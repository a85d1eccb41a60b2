"""The datasets that docs/datasets.md shows how to write, trained on as it says."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.distributed.test_runs import wait_for_step

PAGE = (runs.ROOT / "docs" / "datasets.md").read_text("utf-8")
SECTION = PAGE.partition("## A dataset of one's own")[2]
ARGUMENTS = ["--checkpoint.interval=6", "--training.steps=30"]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("dataset", ["sums", "walks"])
def test_example_trains_and_goes_on_after_a_kill(dataset: str, tmp_path: Path):
    (tmp_path / "my_data.py").write_text(block("python"))
    # The page's TOML, in the config of the tests' runs.
    config = tmp_path / "config.toml"
    toml = block("toml").replace("[training]\n", "") + runs.CONFIG.replace('"stdlib"', '"sums"')
    assert toml.count('dataset = "sums"') == 2
    config.write_text(toml.replace('dataset = "sums"\n', "", 1))
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])

    def start(folder: Path) -> subprocess.Popen[str]:
        arguments = [*runs.command(folder, *ARGUMENTS), f"--training.dataset={dataset}"]
        config.write_text(
            toml.replace('dataset = "sums"\n', "", 1)
        )  # `command` has written its own
        return subprocess.Popen(
            arguments,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return output

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))
    process = start(killed)
    wait_for_step(killed, 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert "resum" in finish(start(killed)).lower()
    assert runs.curve(killed) == runs.curve(whole) and len(runs.curve(whole)) == 30
