"""The commands of docs/start/pretrained.md on a model whose first loss is transformers'."""

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
FEWER = ["--parallelism.data_parallel_shard_degree=1", "--training.steps=2"]


@pytest.mark.parametrize(
    "model", ["small_smollm2", pytest.param("smollm2", marks=pytest.mark.nightly)]
)
@pytest.mark.timeout(1800)
def test_the_page(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> None:
    """By day on a random model and fewer ranks; test_generation.py has what the real one says."""
    pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    folder, knows = request.getfixturevalue(model), model == "smollm2"
    prepare(tmp_path, folder)
    assert [(tmp_path / CONFIG).read_text()] == blocks(PAGE, "toml")
    made, *others = commands(PAGE)
    assert made == ["python", "scripts/make_smollm2.py"]  # the fixture runs it
    printed: dict[str, list[str]] = {}
    for words in others:
        more = []
        if words[0] == "torchrun" and not knows:
            words[2], more = "3", FEWER
        name = words[words.index("torchtitan") + 1]
        printed.setdefault(name, []).append(run(tmp_path, words, *more))
    look, compare = printed["inspect"]
    assert "a Hugging Face folder" in look
    rows = (tmp_path / "outputs" / "smollm2" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert first["step"] == 1
    expected = loss_of_transformers(folder, first_step(tmp_path))
    assert first["loss"] == pytest.approx(expected, abs=1e-4)
    tensors = 272 if knows else 20
    assert f"{tensors} tensors compared" in compare and "only in" not in compare
    assert "hyper-parameters" not in compare
    (score,) = re.findall(r"capitals.*?acc.*?([01]\.\d+)", *printed["evaluate"])
    (code,) = blocks(PAGE, "python")
    answer = run(tmp_path, [sys.executable, "-c", code])
    _, exported = printed["generate"]
    start = answer.partition("<|im_start|>assistant\n")[2][:20]
    assert len(start) == 20 and exported.startswith(start), "the trained model, exported"
    if knows:
        assert float(score) >= 0.75, "chance is a third"
        assert all("Paris" in text for text in [*printed["generate"], answer])
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
