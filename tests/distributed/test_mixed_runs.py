"""Whole runs on tokens made beforehand and on a mixture: losses, metrics, a kill, another mesh."""

import json
import random
from pathlib import Path

import pytest

from tests.distributed import runs
from torchtitan import cli


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths."""
    generator = random.Random(5)
    words = ["lane", "mesh", "step", "shard", "epoch"]
    texts = [" ".join(generator.choices(words, k=generator.choice([3, 9, 90]))) for _ in range(400)]
    file = tmp_path_factory.mktemp("text") / "words.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


def test_the_loss_on_tokens_is_that_on_the_text(text: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    data = f"--training.dataset_path={text}"
    words = ["tokenize", data, f"--output={tokens}", "--data.lanes=8", "--workers=1"]
    assert cli.main(words) == 0
    for name, path in (("text", text), ("tokens", tokens)):
        arguments = ("--training.dataset=auto", f"--training.dataset_path={path}")
        runs.run(tmp_path / name, *arguments, "--checkpoint.enable=false")
    curve = runs.curve(tmp_path / "text")
    assert len(curve) == 10 and runs.curve(tmp_path / "tokens") == curve


def test_rows_that_are_left_out_are_told(text: Path, tmp_path: Path) -> None:  # row 57
    file = tmp_path / "rows.jsonl"
    file.write_text("\n{\n".join(text.read_text().splitlines()))
    arguments = ("--training.dataset=auto", f"--training.dataset_path={file}")
    skip = ("--data.on_bad_row=skip", "--checkpoint.enable=false", "--training.steps=4")
    runs.run(tmp_path / "run", *arguments, *skip)
    told = [record.get("bad_rows", 0) for record in runs.records(tmp_path / "run")]
    assert len(told) == 4 and told == sorted(told) and 0 < told[-1] < 100
    fewer = f"--data.max_bad_rows={told[-1] - 1}"
    done = runs.run(tmp_path / "stopped", *arguments, *skip, fewer, expect=3)
    assert f"left out {told[-1]} rows" in done.stderr


def test_a_mixture_that_is_killed_and_goes_on_on_another_mesh(text: Path, tmp_path: Path) -> None:
    sources = f"[{{path = '{text}', weight = 3}}, {{dataset = 'stdlib', weight = 1}}]"
    arguments = ("--training.dataset=auto", f"--data.sources={sources}", "--training.steps=12")
    runs.run(tmp_path / "whole", *arguments)
    runs.run_killed(tmp_path / "killed", *arguments)
    done = runs.run(tmp_path / "killed", *arguments, processes=2)
    assert "Resumed from step 4" in done.stderr
    for (step, loss, _), expected in zip(
        runs.curve(tmp_path / "killed"), runs.curve(tmp_path / "whole"), strict=True
    ):
        assert (step, loss) == (expected[0], pytest.approx(expected[1], rel=2e-6))
    for name in ("whole", "killed"):
        record = runs.records(tmp_path / name)[-1]
        assert record["source_tokens/words"] == record["num_tokens_seen"] * 3 / 4
        assert record["source_tokens/stdlib"] == record["num_tokens_seen"] / 4
