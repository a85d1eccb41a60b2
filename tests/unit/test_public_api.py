"""`import torchtitan`: runs, their folders and text, in the process of a script or notebook."""

import faulthandler
import gc
import importlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import torchtitan
from torchtitan.checkpoint import async_save
from torchtitan.cli import main
from torchtitan.utils import host
from torchtitan.utils.garbage import GarbageCollection
from torchtitan.utils.processes import STOP_SIGNALS

SETTINGS: dict[str, Any] = {
    "model.args": {"n_layers": 2, "dim": 32, "n_heads": 4, "max_seq_len": 64},
    "training": {"dataset": "stdlib", "local_batch_size": 4, "global_batch_size": 4},
    "training.seq_len": 32,
    "training.steps": 4,
    "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 1,
    "checkpoint": {"enable": True, "interval": 2},
    "validation": {"enable": True, "dataset": "stdlib", "steps": 1, "freq": 2},
    "metrics.log_freq": 1,
    "job.device": "cpu",
    "debug.cpu_allocator": "system",
}


def config_in(folder: Path, **changes: Any) -> torchtitan.JobConfig:
    return torchtitan.load_config(None, {**SETTINGS, "job.dump_folder": folder, **changes})


def at_step(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something at the end of a step of the loop."""
    end_step = GarbageCollection.step

    def step(self: GarbageCollection, done: int, what: str = "step") -> None:
        if what == "step" and done == number:
            action()
        end_step(self, done, what)

    monkeypatch.setattr(GarbageCollection, "step", step)


def process_state() -> dict[str, Any]:
    """Return all that a run must leave as it was."""
    gc.collect()
    process = psutil.Process()
    logger = logging.getLogger("torchtitan")
    return {
        "signals": [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGABRT)],
        "variables": dict(os.environ),
        "threads": {thread.name for thread in threading.enumerate()},
        "children": {child.pid for child in process.children(recursive=True)},
        "descriptors": process.num_fds(),
        "log": (logger.level, list(logger.handlers)),
        "random": torch.get_rng_state().tolist(),
        "torch threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "group": torch.distributed.is_initialized(),
        "errors": sys.excepthook,
        "stacks at a crash": faulthandler.is_enabled(),
        "collector": (gc.isenabled(), gc.get_freeze_count()),
        "parameters": sum(type(each) is nn.Parameter for each in gc.get_objects()),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> torchtitan.Run:
    """A run to its end; what is set up once in a process is set up afterwards."""
    return torchtitan.train(config_in(tmp_path_factory.mktemp("api") / "run"))


def test_an_interrupted_run_is_saved_and_goes_on(
    run: torchtitan.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulthandler.enable(sys.__stderr__)
    torch.rand(1)  # another state than a run begins with
    before = process_state()
    with monkeypatch.context() as patch:
        at_step(2, lambda: signal.raise_signal(signal.SIGINT), patch)
        stopped = torchtitan.train(config_in(tmp_path / "run"))
    assert (stopped.status["status"], stopped.status["step"]) == ("preempted", 3)
    assert list(stopped.checkpoints) == [2, 3]
    resumed = torchtitan.train(stopped.config)
    assert resumed.status["status"] == "completed"
    assert resumed.metrics()["loss"] == run.metrics()["loss"]
    assert process_state() == before


def diverge(folder: Path) -> None:
    # Clipping would keep the loss finite.
    torchtitan.train(config_in(folder, **{"optimizer.lr": 1e30, "training.max_norm": 1e9}))


def fail(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(2, lambda: {}["nobody foresaw"], patch)  # type: ignore[call-overload]
        torchtitan.train(config_in(folder, **{"debug.deterministic": True}))


def interrupt_twice(folder: Path) -> None:
    def press() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        at_step(2, press, patch)
        patch.setattr(async_save, "_lower_priority", lambda: time.sleep(0.5))  # a slow save
        torchtitan.train(config_in(folder, **{"checkpoint.async_mode": "async"}))


@pytest.mark.parametrize(
    ("action", "error", "code"),
    [
        (diverge, torchtitan.NonFiniteError, 5),
        (fail, KeyError, 1),
        (interrupt_twice, KeyboardInterrupt, 130),
    ],
)
def test_an_error_is_raised_and_leaves_nothing_behind(
    run: torchtitan.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Any,
    error: type[BaseException],
    code: int,
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's keep the error, and its frames
    before = process_state()
    with pytest.raises(error):
        action(tmp_path / "run")
    assert process_state() == before
    assert torchtitan.Run(tmp_path / "run").status["exit_code"] == code
    # The folder is free, and nothing of the first run writes to it.
    assert (
        torchtitan.train(config_in(tmp_path / "run", **{"job.new_run": True})).status["step"] == 4
    )


def test_settings_that_cannot_work_are_raised_before_the_folder_is_made(tmp_path: Path) -> None:
    changes = {"training.seq_len": 65, "training.dataset": "text", "training.dataset_path": "no"}
    with pytest.raises(torchtitan.ConfigError) as raised:
        torchtitan.train(config_in(tmp_path / "run", **changes))
    keys = {issue.key for issue in raised.value.problems}
    assert keys == {"training.seq_len", "training.dataset_path"}
    assert list(tmp_path.iterdir()) == []


def test_a_run_joins_the_ranks_by_itself(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="destroy_process_group"):
            torchtitan.train(config_in(tmp_path / "run"))
    finally:
        torch.distributed.destroy_process_group()


def test_a_dry_run_is_a_command(tmp_path: Path) -> None:
    with pytest.raises(torchtitan.ConfigError, match="dry run"):
        torchtitan.train(config_in(tmp_path / "run", **{"comm.mode": "fake_backend"}))


def test_another_thread_can_train(run: torchtitan.Run, tmp_path: Path) -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(torchtitan.train(config_in(tmp_path / "run")).metrics()["loss"])
        except BaseException as error:
            found.append(error)

    before = process_state()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [run.metrics()["loss"]]
    assert process_state() == before


def test_modes_of_the_caller_do_not_reach_a_run(run: torchtitan.Run, tmp_path: Path) -> None:
    with (
        torch.device("meta"),
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        same = torchtitan.train(config_in(tmp_path / "run"))
        model, tokenizer = same.load()
        text = torchtitan.generate(model, tokenizer, "def ", max_new_tokens=9)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert same.metrics()["loss"] == run.metrics()["loss"]
    assert text == torchtitan.generate(*run.load(), "def ", max_new_tokens=9)


def test_a_second_run_at_the_same_time_is_refused_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[BaseException] = []

    def train_too() -> None:
        try:
            torchtitan.train(config_in(tmp_path / "second"))
        except RuntimeError as error:
            refused.append(error)

    def begin() -> None:
        thread = threading.Thread(target=train_too)
        thread.start()
        thread.join()

    at_step(2, begin, monkeypatch)
    before = process_state()
    first = torchtitan.train(config_in(tmp_path / "first"))
    assert "another thread of this process trains" in str(*refused)
    assert first.status["status"] == "completed" and process_state() == before


def test_an_error_with_issues_comes_whole_from_another_process() -> None:
    issue = torchtitan.ConfigIssue("training.steps", "is missing", "set it")
    words = f"import pickle; print(pickle.loads({pickle.dumps(torchtitan.ConfigError([issue]))!r}))"
    printed = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert printed.stdout == "training.steps: is missing. Fix: set it.\n"


def test_the_time_limit_counts_from_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_IMPORTED", time.perf_counter() - 1000)
    status = torchtitan.train(config_in(tmp_path / "run", **{"training.max_seconds": 60.0})).status
    assert status["status"] == "completed"


def test_messages_are_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    torchtitan.train(config_in(tmp_path / "alone"))
    assert capsys.readouterr().err.count("Run folder:") == 1
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(sys.stdout)])
    torchtitan.train(config_in(tmp_path / "configured"))
    shown = capsys.readouterr()
    assert shown.out.count("Run folder:") == 1 and "Run folder:" not in shown.err


def test_metrics_are_those_of_the_file(run: torchtitan.Run) -> None:
    table = run.metrics()
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    assert table["step"] == [1, 2, 3, 4]
    assert {len(column) for column in table.values()} == {4}
    assert table["validation/loss"][0] is None and table["validation/loss"][1] is not None
    cells = {(r["step"], name): value for r in records for name, value in r.items()}
    rows = [(row, step) for row, step in enumerate(table["step"])]
    kept = {(step, name): table[name][row] for row, step in rows for name in table}
    assert {key: value for key, value in kept.items() if key in cells} == cells
    assert all(value is None for key, value in kept.items() if key not in cells)


def test_a_run_is_read_from_its_folder(run: torchtitan.Run, tmp_path: Path) -> None:
    found = torchtitan.Run(str(run.folder))
    assert found.status == json.loads((run.folder / "run_status.json").read_text())
    assert found.config.training.steps == 4
    steps = {step: run.folder / "checkpoint" / f"step-{step}" for step in (2, 4)}
    assert found.checkpoints == steps
    assert repr(found).startswith(f"<Run '{run.folder}': completed, step 4, loss 5.")
    with pytest.raises(torchtitan.ConfigError, match="holds no run"):
        torchtitan.Run(tmp_path)
    with pytest.raises(torchtitan.ConfigError, match="has no valid checkpoint"):
        found.load(step=3)


def test_text_is_that_of_the_command(
    run: torchtitan.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = run.load()
    text = torchtitan.generate(model, tokenizer, "def ", max_new_tokens=9)
    assert main(["generate", str(run.folder), "def ", "--max-new-tokens=9"]) == 0
    assert capsys.readouterr().out == f"{text}\n" and len(text) > 3
    end = text[3:5]
    assert (
        torchtitan.generate(model, tokenizer, "def ", max_new_tokens=9, stop=end)
        == (text[: text.index(end)])
    )
    drawn = {"max_new_tokens": 9, "temperature": 1.0, "top_k": 50, "seed": 3}
    both = torchtitan.generate(model, tokenizer, ["def ", "import os"], **drawn)
    assert both == torchtitan.generate(
        model, tokenizer, ["def ", "import os"], batch_size=1, **drawn
    )
    assert torchtitan.generate(model, tokenizer, "def ", **drawn) == both[0] != text


def test_a_tokenizer_file_of_any_name_is_found_in_the_run(tmp_path: Path) -> None:
    assets = Path(torchtitan.__file__).parents[1] / "tests" / "assets" / "tokenizer"
    shutil.copytree(assets, tmp_path / "mine")
    shutil.copy(assets / "tokenizer.json", tmp_path / "mine" / "my.json")
    (tmp_path / "mine" / "tokenizer.json").write_text("another one")
    changes = {"model.tokenizer_path": str(tmp_path / "mine" / "my.json"), "training.steps": 1}
    run = torchtitan.train(config_in(tmp_path / "run", **changes))
    shutil.rmtree(tmp_path / "mine")
    assert torchtitan.generate(*run.load(), "def ", max_new_tokens=2)


def test_another_tokenizer_can_be_used(run: torchtitan.Run) -> None:
    model, tokenizer = run.load()

    class Loud:
        def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
            return tokenizer.encode(text * 9, bos, eos)

        def decode(self, ids: list[int]) -> str:
            return f"{len(ids)} tokens"

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    # 54 ids and the start token of the model's longest sequence, 64.
    assert torchtitan.generate(model, Loud(), "import", max_new_tokens=30) == "9 tokens"


def test_a_step_can_be_loaded_and_computes_logits(run: torchtitan.Run) -> None:
    before = process_state()
    model, tokenizer = run.load(step=2)
    newest, _ = torchtitan.load(run.folder)
    tokens = torch.tensor([tokenizer.encode("def f", bos=True, eos=False)])
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        logits = model.head(model(tokens, positions))
        assert logits.shape == (1, 6, tokenizer.vocab_size)
        assert not torch.equal(logits, newest.head(newest(tokens, positions)))
    torchtitan.generate(model, tokenizer, "a", max_new_tokens=2)
    del model, newest
    assert process_state() == before


def test_what_cannot_be_continued_is_said(run: torchtitan.Run) -> None:
    model, tokenizer = run.load()
    for prompt, options, message in [
        ("", {}, "prompt: is empty"),
        (["a", ""], {}, r"prompt\[1\]: is empty"),
        ([], {}, "is an empty list"),
        ("a" * 70, {}, "longest sequence is 64"),
        ({"role": "user", "content": "Hi"}, {}, "is not a list of objects"),
        ([{"role": "user"}], {}, "has no text as content"),
        ([{"role": "user", "content": "Hi"}], {}, "chat template"),
        ("a", {"top_p": 2.0, "max_new_tokens": 0}, r"top_p = 2.0: .*\nmax_new_tokens = 0: "),
    ]:
        with pytest.raises(torchtitan.ConfigError, match=message):
            torchtitan.generate(model, tokenizer, prompt, **options)  # type: ignore[call-overload]
    for option in ({"dtype": "int8"}, {"device": "cuda:1"}):
        with pytest.raises(torchtitan.ConfigError, match="is unknown"):
            torchtitan.load(run.folder, **option)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Linear is not a model that torchtitan\.load returned"):
        torchtitan.generate(nn.Linear(2, 2), tokenizer, "a")


def test_the_program_of_torchrun_does_not_hide_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = importlib.import_module("torchtitan.train")

    monkeypatch.setattr(torchtitan, "train", program)  # as importing it does
    with pytest.raises(torchtitan.ConfigError, match="dry run"):
        torchtitan.train(config_in(tmp_path, **{"comm.mode": "fake_backend"}))
