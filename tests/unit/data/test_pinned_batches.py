"""`pin_memory` reaches the batches, of training and of validation, where there is a GPU."""

import pytest
import torch
from data_runs import Run, make_config, make_documents, write_jsonl

from torchtitan.config import JobConfig
from torchtitan.data.named_sources import validation_sets
from torchtitan.data.tokenizers import ByteTokenizer
from torchtitan.data.validation_reader import build_reader
from torchtitan.models.batch import Batch


def config_of(path: str, pin_memory: bool) -> JobConfig:
    """Training and one set read the same file, with the same options."""
    table = make_config(path).model_dump(exclude_none=True)
    options = {"dataloader": {"pin_memory": pin_memory}}
    section = {"enable": True, "dataset": "auto", "dataset_path": path, **options}
    training = table["training"] | options
    return JobConfig.model_validate(table | {"training": training, "validation": section})


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("pin_memory", [True, False])
def test_batches_are_pinned(tmp_path, monkeypatch, has_gpu: bool, pin_memory: bool):
    """Memory is pinned by the driver of a GPU, so a list stands in for that."""
    pinned: list[Batch] = []

    def pin(batch: Batch) -> Batch:
        pinned.append(batch)
        return batch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(Batch, "pin_memory", pin)
    config = config_of(write_jsonl(tmp_path, make_documents(90)), pin_memory)
    wanted = pin_memory and has_gpu
    run = Run(config)
    run.step()
    run.close()
    assert bool(pinned) is wanted
    pinned.clear()
    (named,) = validation_sets(config)
    alone = {"num_lanes": None, "max_sequences": None, "dp_degree": 1, "dp_rank": 0}
    steps = build_reader(named, ByteTokenizer(), **alone).start()
    (batch,) = steps.next_step().microbatches
    steps.close()
    assert [item is batch for item in pinned] == [True] * wanted
