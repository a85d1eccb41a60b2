"""The ledger of real runs: the same on every mesh and after every stop; steps that are left out."""

import ast
import itertools
import json
from pathlib import Path

import pytest

from tests.distributed import runs
from torchtitan.cli import main
from torchtitan.data.ledger import LedgerStep, read_ledger

LEDGER = "--data.ledger=true"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.run(folder, LEDGER)
    return folder


def lanes(steps: dict[int, LedgerStep]) -> list[object]:
    return [step.lanes for step in steps.values()]


@pytest.mark.fault("F30", "F31", "F32")
def test_kills_and_meshes_leave_one_ledger(whole: Path, tmp_path: Path) -> None:
    """Killed after step 6, it goes on after step 4, on two ranks that share the data and then on
    two that have the same."""
    folder = tmp_path / "run"
    runs.run_killed(folder, LEDGER, "--training.steps=8")
    runs.run(folder, LEDGER, "--training.steps=8", processes=2)
    tensor = "--parallelism.tensor_parallel_degree=2"
    runs.run(folder, LEDGER, "--training.steps=10", tensor, processes=2)
    assert len(list((folder / "ledger").iterdir())) == 4
    assert read_ledger(folder) == read_ledger(whole)
    assert list(read_ledger(folder)) == list(range(1, 11))


def test_steps_of_the_data_are_left_out(whole: Path, tmp_path: Path) -> None:
    """From the start or from a checkpoint on, which counts the steps of the data."""
    folder = tmp_path / "run"
    runs.run(folder, LEDGER, '--data.skip=["2-3"]', "--training.steps=4")
    done = runs.run(folder, LEDGER, '--data.skip=["2-3", "8"]', "--training.steps=7", processes=2)
    assert "data.skip" in done.stderr
    found, all_steps = read_ledger(folder), read_ledger(whole)
    assert [step.data_step for step in found.values()] == [1, 4, 5, 6, 7, 9, 10]
    assert lanes(found) == [all_steps[step].lanes for step in (1, 4, 5, 6, 7, 9, 10)]


def test_a_step_is_shown(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As documents with their places and texts."""
    assert main(["data", "show", str(whole), "7"]) == 0
    shown = capsys.readouterr().out.splitlines()
    step = read_ledger(whole)[7]
    spans = list(itertools.chain.from_iterable(lane[0] for lane in step.lanes.values()))
    assert len(shown) == 1 + len(spans)
    for number, line in enumerate(shown[1:]):
        assert line.startswith(f"sequence {number}: ")
    path, _, rest = shown[1].removeprefix("sequence 0: ").partition(":1 (byte 0), tokens ")
    place, _, text = rest.partition(": ")
    start, end = map(int, place.split("-"))
    assert (start, end - start + 1) == (spans[0].start, spans[0].num_tokens)
    document = Path(path).read_text()  # a token is a byte, after the start token
    assert ast.literal_eval(text) == document[start - 1 : end]


def test_a_step_that_one_rank_has_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are those of all lanes, into which a file is cut."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": 9 * str(n)}) + "\n" for n in range(999))
    )
    words = (
        LEDGER,
        "--training.dataset=json",
        f"--training.dataset_path={tmp_path / 'rows.jsonl'}",
    )
    words += (
        "--training.global_batch_size=4",
        "--data.lanes=2",
        "--training.steps=1",
        "--lr_scheduler.warmup_steps=0",
    )
    runs.run(tmp_path / "run", *words, "--checkpoint.enable=false")
    show = ["data", "show", str(tmp_path / "run"), "1"]
    assert main(show) == 0
    whole = capsys.readouterr().out.splitlines()
    (path,) = (tmp_path / "run/ledger").iterdir()
    line = json.loads(path.read_text())
    del line["lanes"]["0"]
    path.write_text(json.dumps(line) + "\n")
    assert main(show) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == [line for line in whole if line.startswith(("sequence 1:", "sequence 3:"))]


def test_a_step_that_the_ledger_lacks(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(whole), "11"]) == 2
    assert "those from 1 to 10" in capsys.readouterr().err
