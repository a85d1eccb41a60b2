"""Whole runs with everything on that watches them, and a run that hangs."""

import json
import signal
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import runs
from tests.wandb_file import offline_runs

WATCHED = [
    "--metrics.enable_tensorboard",
    "--metrics.enable_wandb",
    "--metrics.save_for_all_ranks",
    "--profiling.enable_profiling",
    "--profiling.profile_freq=2",
    "--profiling.profiler_warmup=0",
    "--training.gc_debug",
    "--job.custom_import=leaky",
    "--model.handlers=leaky",
]
LEAKY = """
import torch
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import register_handler

@register_handler("leaky")
class Leaky(ModelHandler):
    def pre_optimizer_hook(self, model):
        self.circle = [torch.zeros(2**18)]
        self.circle.append(self.circle)

    def post_optimizer_hook(self, model):
        del self.circle
"""


def test_watching_changes_no_bit_and_sees_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    (tmp_path / "leaky.py").write_text(LEAKY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    runs.run(alone, "--training.steps=3", "--comm.trace_buf_size=0", processes=2)
    done = runs.run(watched, "--training.steps=3", *WATCHED, processes=2)
    assert runs.curve(watched) == runs.curve(alone)
    assert "Trained 3 steps in " in done.stderr
    found = "After step 1 the garbage collector freed 1 tensor of 1.00 MiB"
    assert done.stderr.count(found) == 2, "on each rank, once"

    done = runs.run(watched, "--training.steps=5", *WATCHED, processes=2)  # goes on
    assert " in this start, 5 steps in " in done.stderr
    own = (watched / "metrics" / "rank_1.jsonl").read_text().splitlines()
    of_main = runs.records(watched)
    assert [json.loads(line)["loss"] for line in own] == [record["loss"] for record in of_main]
    assert len(own) == 5
    for rank in (0, 1):
        events = EventAccumulator(str(watched / "tb" / "watched" / f"rank_{rank}"))
        events.Reload()
        assert [event.step for event in events.Scalars("time_share/compute(%)")] == [1, 2, 3, 4, 5]
        texts = {tag for tag in events.Tags()["tensors"] if tag.endswith("text_summary")}
        if rank == 0:
            assert texts == {"config/text_summary", "data_sample/text_summary"}
            [sample] = events.Tensors("data_sample/text_summary")  # of the first start alone
        else:
            assert not texts
    [text] = sample.tensor_proto.string_val
    line = max(text.decode().splitlines(), key=len).strip().encode()
    uploaded = [file for file in (watched / "wandb").rglob("*") if file.is_file()]
    assert len(line) > 10 and not any(line in file.read_bytes() for file in uploaded)
    run_id = runs.status(watched)["run_id"]
    starts = [run for run in offline_runs(watched) if run.run.run_id == f"{run_id}-rank1"]
    assert [[row["step"] for row in run.history] for run in starts] == [[1, 2, 3], [4, 5]]
    assert starts[0].config["training"]["steps"] == 3
    shares = {key: value for key, value in of_main[-1].items() if key.startswith("time_share/")}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["time_share/startup"] > 0 and shares["time_share/checkpoint"] > 0


def test_a_run_that_hangs_leaves_its_collectives(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--training.steps=100000", "--comm.train_timeout_seconds=4"]
    arguments.append("--checkpoint.enable=false")  # ranks are more patient with a save
    first, second = runs.start_ranks(folder, *arguments, folders=[tmp_path, tmp_path])
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(runs.records(folder)) < 3:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second.send_signal(signal.SIGSTOP)
        done = first.wait(120)
    finally:
        for process in (first, second):
            process.close()
    assert done.returncode == 6
    assert "The newest collectives of this rank are in" in done.stderr
    lines = (folder / "comm_traces" / "rank_0.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["number"] for line in lines]
    assert len(numbers) > 20 and numbers == sorted(set(numbers)), "all of the one group, in order"
    assert json.loads(lines[-1])["ranks"] == [0, 1]
