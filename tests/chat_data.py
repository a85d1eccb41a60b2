"""Chat data of every format for the tests: rows, files, and the rows of all ranks' batches."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config import JobConfig
from torchtitan.data.loader import LanePlan, build_loader
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.models.batch import IGNORE_INDEX

NUM_LANES, GLOBAL_BATCH, SEQ_LEN, PAD = 4, 8, 256, 258
WORDS = ["lane", "naïve", "mesh", "数学", "step\n", "shard"]


def conversation(number: int, generator: random.Random, turns: int = 2) -> list[dict[str, Any]]:
    messages = []
    for turn in range(generator.randint(1, turns)):
        text = " ".join(generator.choices(WORDS, k=generator.randint(1, 5)))
        messages += [
            {"role": "user", "content": f"q{number}.{turn} {text}"},
            {"role": "assistant", "content": f"a{number}.{turn} {text[::-1]}"},
        ]
    return messages


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [{"messages": conversation(n, generator)} for n in range(count)]


def pair_rows(count: int) -> list[dict[str, Any]]:
    generator = random.Random(1)
    rows = []
    for n in range(count):
        bad = " ".join(generator.choices(WORDS, k=generator.randint(1, 9)))
        rows.append({"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {bad}"})
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_config(path: str | None, num_workers: int = 0, dataset: str = "auto", **data: Any) -> Any:
    training = {
        "dataset": dataset,
        "dataset_path": path,
        "seq_len": data.pop("seq_len", SEQ_LEN),
        "dataloader": {"num_workers": num_workers},
        "document_mask": data.pop("document_mask", True),
    }
    data.setdefault("format", "chat")
    return JobConfig.model_validate({"training": training, "data": data})


class ChatRun:
    """All data-parallel ranks of a run in this process, with whole batches of a rank."""

    def __init__(self, config: Any, dp: int = 1, lane_states: Any = None, local: int = 2):
        tokenizer = build_tokenizer("bytes")
        self.loaders = [
            build_loader(
                config.training,
                config.data,
                7,
                tokenizer,
                LanePlan(NUM_LANES, dp, rank, GLOBAL_BATCH, local),
                lane_states,
            )
            for rank in range(dp)
        ]
        self.lane_states: Any = {}
        self.counts: tuple[int, ...] = ()
        self.num_positions = 0
        self.batches: list[Any] = []

    def step(self) -> list[Any] | None:
        """The rows of a step by (round, lane), without their padding; None at the end."""
        rows: dict[tuple[int, int], Any] = {}
        steps = [loader.next_step() for loader in self.loaders]
        self.lane_states = {k: v for step in steps for k, v in step.lane_states.items()}
        self.lane_states = json.loads(json.dumps(self.lane_states))
        self.counts = tuple(map(sum, zip(*(step.counts for step in steps))))
        if all(step.ended for step in steps):
            return None
        self.batches = [batch for step in steps for batch in step.microbatches]
        self.num_positions += sum(batch.num_tokens for batch in self.batches)
        for rank, step in enumerate(steps):
            found = [row for batch in step.microbatches for row in _rows(batch)]
            lanes = NUM_LANES // len(self.loaders)
            for number, row in enumerate(found):
                rows[number // lanes, rank * lanes + number % lanes] = row
        return [rows[key] for key in sorted(rows)]

    def steps(self) -> Iterator[list[Any]]:
        while (step := self.step()) is not None:
            yield step

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def _rows(batch: Any) -> Iterator[Any]:
    for tokens, labels, documents, positions in zip(
        *(batch[name].numpy() for name in ("tokens", "labels", "document_ids", "positions"))
    ):
        size = int((tokens != PAD).sum())
        assert np.all(tokens[size:] == PAD) and np.all(labels[size:] == IGNORE_INDEX)
        yield tuple(tuple(x[:size].tolist()) for x in (tokens, labels, documents, positions))


def texts(row: Any, trained: bool = False) -> list[str]:
    """The documents of a row as text; `trained`: their targets only."""
    tokens, labels, documents, _ = row
    found: list[list[int]] = [[] for _ in range(max(documents, default=-1) + 1)]
    for token, label, document in zip(tokens, labels, documents):
        if not trained:
            found[document].append(token)
        elif label != IGNORE_INDEX:
            found[document].append(label)
    return [bytes(t for t in ids if t < 256).decode() for ids in found]


def all_steps(config: Any, dp: int = 1, **options: Any) -> list[Any]:
    run = ChatRun(config, dp, **options)
    found = list(run.steps())
    run.close()
    return found
