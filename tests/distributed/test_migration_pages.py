"""The configs with which docs/start/from_torchtune.md and from_transformers.md end."""

import json
from pathlib import Path

import pytest

from tests.distributed.pages import DOCS, blocks, run

ROWS = {
    "from_torchtune.md": {"instruction": "Count to 3.", "input": "", "output": "1 2 3"},
    "from_transformers.md": {
        "messages": [
            {"role": "user", "content": "Count to 3."},
            {"role": "assistant", "content": "1 2 3"},
        ]
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_the_example_trains_and_is_exported(small_smollm2: Path, tmp_path: Path, name: str) -> None:
    """With a small model and data of this machine in place of the hub's."""
    (tmp_path / "my.toml").write_text(blocks(DOCS / "start" / name, "toml")[-1])
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS[name]) + "\n") * 40)
    here = {
        "checkpoint.initial_load_path": small_smollm2,
        "training.dataset": "json",
        "training.dataset_path": "rows.jsonl",
        "training.seq_len": 128,
        "training.global_batch_size": 4,
        "training.steps": 3,
        "lr_scheduler.warmup_steps": 1,
        "job.dump_folder": "outputs/mine",
    }
    words = [f"--{key}={value}" for key, value in here.items()]
    run(tmp_path, ["torchtitan", "train", "my.toml", *words])
    last = json.loads((tmp_path / "outputs/mine/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    exported = run(tmp_path, ["torchtitan", "export", "outputs/mine", "outputs/hf", "--merge"])
    assert "in transformers" in exported
