"""Small datasets of every format, and a global batch put together from all ranks."""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from torchtitan.config import JobConfig
from torchtitan.data.loader import LanePlan, Loader, build_loader
from torchtitan.data.tokenizers import build_tokenizer

NUM_LANES = 4
GLOBAL_BATCH = 8
SEQ_LEN = 48


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of very different lengths, each with its number in it, some longer than samples."""
    generator = random.Random(seed)
    words = ["lane", "naïve", "mesh", "数学", "step\n", "shard"]
    return [
        f"<{number}> " + " ".join(generator.choices(words, k=generator.choice([0, 3, 9, 40])))
        for number in range(count)
    ]


def _lines(documents: list[str]) -> bytes:
    rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(documents)]
    return ("\n".join(rows) + "\n").encode()


def write_jsonl(folder: Path, documents: list[str]) -> str:
    (folder / "data.jsonl").write_bytes(_lines(documents))
    return str(folder / "data.jsonl")


def write_gz(folder: Path, documents: list[str]) -> str:
    """Two files of unequal size for four lanes: read by stride."""
    for name, part in (("a", documents[:90]), ("b", documents[90:])):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(_lines(part)))
    return str(folder)


def write_zst(folder: Path, documents: list[str]) -> str:
    """More files than lanes, one of them of two frames."""
    for n in range(5):
        part = documents[n::5]
        compress = zstandard.ZstdCompressor().compress
        content = compress(_lines(part[:7])) + compress(_lines(part[7:]))
        (folder / f"part-{n}.json.zst").write_bytes(content)
    return str(folder / "*.json.zst")


def write_array(folder: Path, documents: list[str]) -> str:
    rows = [{"text": text, "id": n} for n, text in enumerate(documents)]
    (folder / "data.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    return str(folder / "data.json")


def write_mixed(folder: Path, documents: list[str]) -> str:
    """Lines that are cut into ranges beside a file that cannot be."""
    (folder / "a.ndjson").write_bytes(_lines(documents[:150]))
    (folder / "b.json.gz").write_bytes(gzip.compress(_lines(documents[150:])))
    return str(folder)


def write_text(folder: Path, documents: list[str]) -> str:
    for number, text in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(text, "utf-8")
    return str(folder)


WRITERS: dict[str, Callable[[Path, list[str]], str]] = {
    "jsonl": write_jsonl,
    "gz": write_gz,
    "zst": write_zst,
    "array": write_array,
    "mixed": write_mixed,
    "text": write_text,
}


class Run:
    """All data-parallel ranks of one run, in this process; workers are real processes."""

    def __init__(
        self,
        config: JobConfig,
        dp: int = 1,
        lane_states: dict[str, Any] | None = None,
        seed: int = 7,
        num_lanes: int = NUM_LANES,
        global_batch: int = GLOBAL_BATCH,
        fingerprint: str | None = None,
    ):
        tokenizer = build_tokenizer("bytes")
        plans = [LanePlan(num_lanes, dp, r, global_batch, 1) for r in range(dp)]
        self.rounds = plans[0].samples_per_lane
        self.loaders: list[Loader] = [
            build_loader(
                config.training, config.data, seed, tokenizer, plan, lane_states, fingerprint
            )
            for plan in plans
        ]
        self.lane_states: dict[str, Any] = {}
        self.source_tokens: dict[str, int] = {}
        self.ended = False

    def step(self, name: str = "tokens") -> np.ndarray:
        """One global step, int64 `[rounds, num_lanes, seq_len]`."""
        parts, states, ended = [], {}, []
        for loader in self.loaders:
            data = loader.next_step()
            rows = np.concatenate([batch[name].numpy() for batch in data.microbatches])
            parts.append(rows.reshape(self.rounds, -1, rows.shape[-1]))
            states.update(data.lane_states)
            ended.append(data.ended)
            self.source_tokens = data.source_tokens
        self.lane_states = json.loads(json.dumps(states))
        self.ended = all(ended)
        return np.concatenate(parts, axis=1)

    def steps(self, name: str = "tokens") -> Iterator[np.ndarray]:
        """Steps until all ranks have ended."""
        while True:
            step = self.step(name)
            if self.ended:
                return
            yield step

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def make_config(path: str | None, num_workers: int = 0, dataset: str = "auto", **data: Any) -> Any:
    training = {
        "dataset": dataset,
        "dataset_path": path,
        "seq_len": SEQ_LEN,
        "dataloader": {"num_workers": num_workers},
        "document_mask": data.pop("document_mask", False),
    }
    return JobConfig.model_validate({"training": training, "data": data})
