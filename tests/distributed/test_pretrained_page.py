"""The commands of docs/start/pretrained.md on a real model, whose first loss is transformers'."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.pages import DOCS, blocks, commands, prepare, run
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.data.loader import LanePlan, StepData, build_loader
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.training.pretrained_config import with_pretrained

PAGE, CONFIG = DOCS / "start" / "pretrained.md", "docs/examples/smollm2.toml"


@pytest.mark.parametrize(
    "settings",
    [
        ["--parallelism.data_parallel_shard_degree=1", "--training.steps=2"],
        pytest.param([], marks=pytest.mark.nightly),
    ],
    ids=["3 ranks, 2 steps", "as it stands"],
)
def test_the_page(smollm2: Path, tmp_path: Path, settings: list[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    prepare(tmp_path, smollm2)
    assert [(tmp_path / CONFIG).read_text()] == blocks(PAGE, "toml")
    made, *others = commands(PAGE)
    assert made == ["python", "scripts/make_smollm2.py"]  # the fixture runs it
    printed: dict[str, list[str]] = {}
    for words in others:
        more = []
        if settings and words[0] == "torchrun":
            words[2], more = "3", settings
        name = words[words.index("torchtitan") + 1]
        printed.setdefault(name, []).append(run(tmp_path, words, *more))
    look, compare = printed["inspect"]
    assert "a Hugging Face folder" in look
    assert all("Paris" in answer for answer in printed["generate"])
    rows = (tmp_path / "outputs" / "smollm2" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert first["step"] == 1
    expected = loss_of_transformers(smollm2, first_step(tmp_path))
    assert first["loss"] == pytest.approx(expected, abs=1e-4)
    assert "272 tensors compared" in compare and "only in" not in compare
    assert "hyper-parameters" not in compare
    (score,) = re.findall(r"capitals.*?acc.*?([01]\.\d+)", *printed["evaluate"])
    assert float(score) >= 0.75, "chance is a third"
    (code,) = blocks(PAGE, "python")
    answer = run(tmp_path, [sys.executable, "-c", code])
    assert "Paris" in answer
    shutil.rmtree(tmp_path / "outputs")  # half a gigabyte


def first_step(folder: Path) -> StepData:
    """The batches of the first step, of all ranks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        words = [CONFIG, "--training.dataloader.num_workers=0"]
        config = with_pretrained(load_config(words)).config
        context = RunContext(config, 6, "cpu")
        plan = LanePlan(context.num_lanes, 1, 0, context.global_batch_size, 2)
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        loader = build_loader(config.training, config.data, config.debug.seed, tokenizer, plan)
        step = loader.next_step()
        loader.close()
    finally:
        os.chdir(before)
    return step


def loss_of_transformers(folder: Path, step: StepData) -> float:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in step.microbatches:
            labels = batch["labels"].flatten()
            logits = model(batch["tokens"]).logits.flatten(0, 1)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != IGNORE_INDEX).sum())
    assert count > 300
    return total / count
