"""`torchtitan evaluate`: its table and file, meshes, and what is rejected before loading."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import CONFIG, environment, execute
from tests.eval_tasks import NAMES, write_tasks
from torchtitan.cli import main

MODULE = [sys.executable, "-m", "torchtitan"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "torchtitan"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tasks(tmp_path_factory.mktemp("eval")))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run of a tiny model of bytes."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(CONFIG)
    words = ["train", "config.toml", "--job.dump_folder=out", "--training.steps=4"]
    done = execute([*MODULE, *words, "--model.args.max_seq_len=64"], environment(), folder)
    assert done.returncode == 0, done.stderr
    return str(folder / "out")


def test_the_same_file_on_every_mesh(run_folder: str, tasks: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    words = ["evaluate", run_folder, f"--tasks={','.join(NAMES)}", f"--task-dir={tasks}"]
    words += ["--limit=3", "--num-fewshot=1", "--batch-size=2", "--output"]
    done = execute([*MODULE, *words, str(tmp_path / "alone.json")], environment())
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "alone.json").read_text())
    results = {(row["task"], row["metric"]): row for row in alone["results"]}
    assert len(results) == len(alone["results"]) == 5
    assert results["capitals", "acc"]["num_examples"] == 3
    assert alone["limit"] == 3 and alone["num_fewshot"]["capitals"] == 1
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "stderr", "examples"]
    assert [tuple(line.split()[:2]) for line in lines[1:]] == list(results)
    for number, mesh in enumerate(["--tensor-parallel-degree=2", "--data-parallel-shard-degree=2"]):
        file = tmp_path / f"{number}.json"
        done = execute([*TORCHRUN, *words, str(file), mesh], environment())
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("word_perplexity") == 1
        for row in json.loads(file.read_text())["results"]:
            other = results[row["task"], row["metric"]]
            assert row["num_examples"] == other["num_examples"]
            assert row["value"] == pytest.approx(other["value"], rel=1e-4)


def rejected(capsys: Any, *words: str) -> str:
    assert main(["evaluate", *words]) == 2
    return str(capsys.readouterr().err)


def test_what_is_wrong_is_named(
    run_folder: str, tasks: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert "--tasks" in rejected(capsys, run_folder)
    assert '--tasks = ",": names no task' in rejected(capsys, run_folder, "--tasks=,")
    assert "--limit" in rejected(capsys, run_folder, "--tasks=a", "--limit=0")
    assert "does not exist" in rejected(capsys, str(tmp_path / "no"), "--tasks=capitals")
    (tmp_path / "out.json").touch()
    output = f"--output={tmp_path / 'out.json'}"
    assert "exists already" in rejected(capsys, run_folder, "--tasks=capitals", output)
    output = f"--output={tmp_path / 'no' / 'out.json'}"
    assert "its folder does not exist" in rejected(capsys, run_folder, "--tasks=capitals", output)
    chat = "--apply-chat-template"
    assert "the chat template: is missing" in rejected(capsys, run_folder, "--tasks=a", chat)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = rejected(capsys, run_folder, "--tasks=capitals", f"--task-dir={tasks}")
    assert "needs the package lm-eval" in text and "'.[eval]'" in text


def test_wrong_tasks_are_named(
    run_folder: str, tasks: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval")
    read = []

    class Manager(lm_eval.TaskManager):  # type: ignore[name-defined, misc]
        def __init__(self, include_defaults: bool = True, **given: Any):
            read.append(include_defaults)
            super().__init__(include_defaults=include_defaults, **given)

    monkeypatch.setattr(lm_eval, "TaskManager", Manager)
    folder = f"--task-dir={tasks}"
    text = rejected(capsys, run_folder, "--tasks=capital,prose", folder)
    assert '--tasks = "capital": is not a task' in text and 'did you mean "capitals"?' in text
    broken = Path(tasks) / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: [json\n")
    text = rejected(capsys, run_folder, "--tasks=broken", folder)
    broken.unlink()
    assert '--tasks = "broken": is not a task' in text
    assert f"{broken}: is not readable YAML" in text and "Fix: correct it" in text
    assert sorted(read) == [False, True]  # which takes seconds, once
    text = rejected(capsys, run_folder, "--tasks=prose", f"--task-dir={tmp_path / 'no'}")
    assert "--task-dir = " in text and "is not a folder" in text
    lost = Path(write_tasks(tmp_path))
    (tmp_path / "prose.jsonl").unlink()
    (lost / "answers.yaml").write_text("task: answers\noutput_type: generate_until\n")
    names = "--tasks=prose,capitals,answers"
    text = rejected(capsys, run_folder, names, f"--task-dir={lost}")
    assert '--tasks = "prose": cannot be loaded' in text and "local files" in text
    assert '--tasks = "answers": cannot be loaded' in text and "correct its file" in text
    assert '"capitals"' not in text


def test_documents_that_do_not_fit(
    run_folder: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """A fault that shows after the answers, and requests longer than the model's 64 tokens."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    folder = f"--task-dir={write_tasks(tmp_path)}"
    rows = [{"country": "Peru " * n, "choices": ["a", "b"], "label": 0} for n in (1, 40)]
    file = tmp_path / "capitals.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", run_folder, "--tasks=capitals", folder]) == 0
    assert "2 of 4 requests exceed 64 tokens" in capsys.readouterr().err
    rows = [{"country": "Peru", "choices": ["a", b], "label": 0} for b in ("b", None)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", run_folder, "--tasks=capitals,prose", folder]) == 3
    assert "error: the task capitals fails: TypeError" in capsys.readouterr().err
