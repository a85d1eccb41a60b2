"""Real runs on chat data: one loss packed and padded, a resume on another mesh, more epochs."""

from pathlib import Path

import pytest

from tests.chat_data import chat_rows, write_rows
from tests.distributed import runs

CHAT = (
    "--data.format=chat",
    "--training.dataset=auto",
    "--training.seq_len=128",
    "--training.mixed_precision_param=float64",
    "--training.mixed_precision_reduce=float64",
    "--training.dtype=float64",
)


def test_packed_and_padded_have_one_loss_a_token(tmp_path: Path) -> None:
    data = write_rows(tmp_path, chat_rows(40))
    found = []
    for packing in ("true", "false"):
        folder = tmp_path / f"run_{packing}"
        runs.run(
            folder,
            *(*CHAT, f"--training.dataset_path={data}", f"--data.packing={packing}"),
            *("--training.steps=1", "--optimizer.lr=0", "--lr_scheduler.warmup_steps=0"),
            *("--validation.enable", "--validation.dataset=json", "--checkpoint.enable=false"),
            f"--validation.dataset_path={data}",
        )
        key = "validation/loss"
        found += [record[key] for record in runs.records(folder) if key in record]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_run_goes_on_in_the_middle_of_an_epoch_on_another_mesh(tmp_path: Path) -> None:
    rows = chat_rows(60)
    rows[0]["messages"][1]["content"] = "x" * 300
    rows[7]["messages"][1]["weight"] = 0
    settings = (*CHAT, f"--training.dataset_path={write_rows(tmp_path, rows)}")
    settings = (*settings, "--lr_scheduler.decay_ratio=0", "--data.packing=true")
    runs.run(tmp_path / "whole", *settings, "--training.steps=6")
    for steps, processes, more in ((2, 1, ()), (4, 2, ()), (6, 2, ("tensor",))):
        mesh = [f"--parallelism.{name}_parallel_degree=2" for name in more]
        steps_given = f"--training.steps={steps}"
        runs.run(tmp_path / "parts", *settings, steps_given, *mesh, processes=processes)
    for one, other in zip(runs.curve(tmp_path / "whole"), runs.curve(tmp_path / "parts")):
        assert one == pytest.approx(other, rel=1e-9)
    last = runs.records(tmp_path / "parts")[-1]
    whole = runs.records(tmp_path / "whole")[-1]
    for name in ("rows_truncated", "rows_untrained"):
        assert last.get(name) == whole.get(name)
    assert whole["rows_truncated"] >= 1


def test_epochs_say_the_steps_and_may_grow(tmp_path: Path) -> None:
    settings = (*CHAT, f"--training.dataset_path={write_rows(tmp_path, chat_rows(60))}")
    config = runs.CONFIG.replace("steps = 10\n", "")
    folder = tmp_path / "run"

    def train(epochs: int, processes: int = 1) -> str:
        words = runs.command(folder, *settings, f"--data.epochs={epochs}", processes=processes)
        (tmp_path / "config.toml").write_text(config)
        done = runs.execute(words, env=runs.environment())
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = train(1)
    first = runs.status(folder)
    assert first["status"] == "completed"
    assert f"training.steps is unset, and {first['step']} in this run" in said
    assert "is finished" in train(1)
    train(2, processes=2)
    second = runs.status(folder)
    assert second["status"] in ("completed", "data_exhausted")
    assert 1.7 * first["step"] <= second["step"] <= 2.2 * first["step"]
