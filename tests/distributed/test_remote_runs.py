"""Whole runs with an object store: copies of steps, a new machine, weights, data and exports."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from tests.distributed import runs
from tests.forked import ForkedRun, execute
from tests.s3_server import BUCKET, S3Server, s3_server
from torchtitan.checkpoint.remote import remote_steps

_PACED = """
import sys, time
from torchtitan.utils.garbage import GarbageCollection
from torchtitan.utils.remote import RemoteFolder

url, end_step = sys.argv.pop(1), GarbageCollection.step


def end_step_after_uploads(self, step):
    while step == 5 and RemoteFolder(url).read("checkpoint/step-4/manifest.json") is None:
        time.sleep(0.05)
    if step == 9:
        time.sleep(600)
    end_step(self, step)


GarbageCollection.step = end_step_after_uploads
from torchtitan.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
"""
"""A run that waits for the upload of step 4, and then, while step 8 is uploaded, to be killed."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as server:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield server


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.run(folder)
    return folder


def command(*words: str) -> str:
    done = execute([sys.executable, "-m", "torchtitan", *words], env=runs.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def stored(server: S3Server, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in the store, which was killed during the upload of step 8 and went on elsewhere."""
    url = f"s3://{BUCKET}/runs/mine"
    here, there = (tmp_path_factory.mktemp(name) / "run" for name in ("here", "there"))
    words = runs.command(here, f"--checkpoint.remote_folder={url}")
    at = words.index("-m")
    words = [*words[:at], "-c", _PACED, url, *words[at + 2 :]]
    with closing(ForkedRun(words, runs.environment())) as run:

        def kill(method: str, path: str) -> None:
            if method == "PUT" and "step-8/__0_0.distcp" in path and run.poll() is None:
                os.kill(run._ranks[0].pid, signal.SIGKILL)

        server.after = kill
        assert run.wait(240).returncode == -signal.SIGKILL
    server.good_again()
    assert remote_steps(server.objects("runs/mine/")) == [4]
    shutil.rmtree(here)  # the machine is lost
    server.chance = 0.1
    done = runs.run(there, f"--checkpoint.remote_folder={url}")
    server.good_again()
    assert "Resumed from step 4" in done.stderr
    assert runs.curve(there) == runs.curve(uninterrupted)
    return url


def test_lost_machine_costs_no_more_than_the_last_upload(server: S3Server, stored: str) -> None:
    assert remote_steps(server.objects("runs/mine/"))[-1] == 10
    names = server.objects("runs/mine/")
    assert {"config.toml", "metrics.jsonl", "run_id"} <= names.keys()
    assert names["metrics.jsonl"].count(b"\n") == 10
    assert not any("uploading" in name for name in names)


def test_finished_run_is_known_on_another_machine(
    stored: str, uninterrupted: Path, tmp_path: Path
) -> None:
    done = runs.run(tmp_path / "run", f"--checkpoint.remote_folder={stored}", processes=2)
    assert "The run is finished" in done.stderr
    assert runs.curve(tmp_path / "run") == runs.curve(uninterrupted)


def test_training_goes_on_without_the_store(
    server: S3Server, uninterrupted: Path, tmp_path: Path
) -> None:
    """And the end says so; the same command then uploads the last step."""
    url = f"s3://{BUCKET}/runs/refused"
    server.refuse = lambda method, path: 403 * (method == "PUT" and "distcp" in path)
    done = runs.run(tmp_path / "run", f"--checkpoint.remote_folder={url}", expect=4)
    assert "The last step is not in checkpoint.remote_folder" in done.stderr
    assert "AccessDenied" in done.stderr and "the-secret" not in done.stderr
    assert runs.curve(tmp_path / "run") == runs.curve(uninterrupted)
    assert runs.status(tmp_path / "run")["status"] == "completed"
    assert remote_steps(server.objects("runs/refused/")) == []
    server.good_again()
    runs.run(tmp_path / "run", f"--checkpoint.remote_folder={url}")
    assert remote_steps(server.objects("runs/refused/")) == [10]
    # A stop stays one, for schedulers that start again.
    server.refuse = lambda method, path: 403 * (method == "PUT" and "config.toml" in path)
    words = f"--checkpoint.remote_folder={url}", "--training.steps=12", "--training.max_seconds=0.1"
    done = runs.run(tmp_path / "run", *words, expect=7)
    server.good_again()
    assert "The last step is not in checkpoint.remote_folder" in done.stderr


def test_refused_before_anything_starts(server: S3Server, tmp_path: Path) -> None:
    for url, text in {
        "s3://no-such-bucket/run": "The specified bucket does not exist",
        f"s3://{BUCKET}/../run": "an empty part, or",
    }.items():
        done = runs.run(tmp_path / "run", f"--checkpoint.remote_folder={url}", expect=2)
        assert text in done.stderr and "nothing was started" in done.stderr
    assert not (tmp_path / "run" / "run_status.json").exists()


def test_weights_of_a_step(stored: str, uninterrupted: Path, tmp_path: Path) -> None:
    start = "--checkpoint.initial_load_path"
    runs.run(tmp_path / "here", f"{start}={uninterrupted / 'checkpoint' / 'step-10'}")
    done = runs.run(tmp_path / "there", f"{start}={stored}/checkpoint/step-10", processes=2)
    assert done.returncode == 0
    for ours, theirs in zip(runs.curve(tmp_path / "there"), runs.curve(tmp_path / "here")):
        assert ours == pytest.approx(theirs, rel=2e-5)
    missing = f"{start}={stored}/checkpoint/step-11"
    done = runs.run(tmp_path / "none", missing, expect=2)
    assert "holds no file" in done.stderr


def test_data(server: S3Server, tmp_path: Path) -> None:
    """The same samples as from local files, and a resume that is moved to the store in between."""
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz", "more/c.jsonl")):
        lines = [f'{{"text": "{number} {line} {"word " * 40}"}}\n' for line in range(200)]
        with fsspec.open(str(data / name), "wt", compression="infer") as file:
            file.writelines(lines)
    url = f"s3://{BUCKET}/data"
    fsspec.filesystem("s3").put(f"{data}/", url, recursive=True)
    given = "--training.dataset=json", "--training.steps=8"
    runs.run(tmp_path / "here", *given, f"--training.dataset_path={data}")
    server.chance = 0.1
    runs.run_killed(tmp_path / "there", *given, f"--training.dataset_path={data}")
    runs.run(tmp_path / "there", *given, f"--training.dataset_path={url}")
    server.good_again()
    assert runs.curve(tmp_path / "there") == runs.curve(tmp_path / "here")
    # Other content in the store is noticed by the next start.
    fsspec.filesystem("s3").pipe_file(f"{url}/a.jsonl", b'{"text": "something else"}\n' * 300)
    raised = "--training.steps=9", *given[:1], f"--training.dataset_path={url}"
    done = runs.run(tmp_path / "there", *raised, expect=2)
    assert "a.jsonl had" in done.stderr


def test_export(server: S3Server, stored: str, uninterrupted: Path, tmp_path: Path) -> None:
    """File by file what a local export of the same step is; the config comes last."""
    assert "step-10" in command("inspect", "--headers", f"{stored}/checkpoint/step-10")
    out = f"s3://{BUCKET}/exports/model"
    server.requests.clear()
    said = command("export", f"{stored}/checkpoint/step-10", out)
    assert said.splitlines()[0].startswith(f"{out}: ")
    sent = [path.rpartition("/")[2] for method, path in server.requests if method == "PUT"]
    assert sent[-1] == "config.json"
    command("export", str(uninterrupted / "checkpoint" / "step-10"), str(tmp_path / "model"))
    local = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    remote = server.objects("exports/model/")
    assert remote.keys() == local.keys()
    assert remote["model.safetensors"] == local["model.safetensors"]
    again = execute(
        [sys.executable, "-m", "torchtitan", "export", str(uninterrupted), out],
        env=runs.environment(),
    )
    assert again.returncode == 2 and "exists already" in again.stderr
